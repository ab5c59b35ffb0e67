"""Whom a pool's process ends: its own workers, and nobody who has their numbers later."""

from __future__ import annotations

import os
import signal
import subprocess

from comfy_xdit.pool.supervisor import kill_child


def test_a_child_is_killed_and_its_end_is_left_to_who_waits_for_it():
    with subprocess.Popen(["sleep", "100"]) as child:
        kill_child(child.pid)
        assert child.wait() == -signal.SIGKILL
    kill_child(child.pid)


def test_a_process_that_is_no_child_of_ours_goes_on():
    """As one that was given the number of a worker that has ended."""
    script = "sleep 100 & echo $!; wait $!; echo $?"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        stranger = int(parent.stdout.readline())
        kill_child(stranger)
        # Had it been killed, this would be too late.
        os.kill(stranger, signal.SIGTERM)
        assert int(parent.stdout.readline()) == 128 + signal.SIGTERM
