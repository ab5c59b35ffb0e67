"""Another client of the test pool, in a process of its own; says on standard output how far it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
runpy.run_path(str(HERE.parent.parent / "comfy_xdit" / "mount.py"))["mount"](
    "comfy_xdit", "comfy_xdit_worker"
)

from fault_service import Echo, Keep, Sleep  # noqa: E402
from harness import NAME, OPTIONS  # noqa: E402

from comfy_xdit.pool.client import Pool  # noqa: E402


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(action: str) -> None:
    pool = Pool.connect(NAME, "cpu:2", **OPTIONS)
    say(f"connected {pool.status()['pid']}")
    if action == "connect":
        return
    if action == "keep":
        pool.call(Keep(name="kept"))
    with pool.turn():
        say("turn")
        if action == "sleep":
            pool.call(Sleep(seconds=20.0))
        if action == "slow":
            pool.call(Sleep(seconds=1.0))
        if action == "hold":
            sys.stdin.readline()
    pool.call(Echo(value=1))
    say("done")


if __name__ == "__main__":
    main(sys.argv[1])
