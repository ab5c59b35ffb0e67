"""Two machines to try things on, where there is one: network namespaces joined by a pair of virtual cables.

Needs root and iproute2. What is set up lies in namespaces of its own, and goes with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence

COMMAND_LIMIT_S = 20.0

CLEAR = """
read -r _
for name in "$@"; do
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        pids=$(ip netns pids "$name" 2>/dev/null)
        test -z "$pids" && break
        kill -9 $pids 2>/dev/null
        sleep 0.1
    done
    ip netns del "$name" 2>/dev/null
done
"""
"""Ends what runs in the namespaces and removes them, when its input ends: also when we were killed."""

BURST_KB, LONGEST_WAIT_MS = 64, 50
"""Of a shaped link: what may leave at once, and how long a packet may wait before it is dropped."""


class Unavailable(RuntimeError):
    """Namespaces can't be made here; `str(error)` is one sentence that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """One of the two. namespace: its name; interface and address: of its end of the cable."""

    namespace: str
    interface: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` there, in the same process."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def shape(self, bits_per_s: float | None) -> None:
        """Let so much leave it through the cable in a second; None: all that the machine can."""
        _run(*self.command(["tc", "qdisc", "del", "dev", self.interface, "root"]), may_fail=True)
        if bits_per_s is not None:
            # A faster link needs a longer burst: the kernel lets go of packets at its ticks.
            burst = max(BURST_KB * 1024, int(bits_per_s / 8 / 250))
            limit = ["rate", f"{int(bits_per_s)}bit", "burst", f"{burst}b", "latency", f"{LONGEST_WAIT_MS}ms"]
            _run(*self.command(["tc", "qdisc", "add", "dev", self.interface, "root", "tbf", *limit]))

    def pids(self) -> list[int]:
        """The processes that run there."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace, may_fail=True).split()]


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines on a network of their own, without any way out; at the end they and their processes are gone.

    Raises Unavailable where namespaces can't be made.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise Unavailable(f"network namespaces need `{tool}`; install iproute2")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root; run as root")
    tag = secrets.token_hex(3)
    # Interfaces' names have 15 characters at most.
    machines = [Machine(namespace=f"cx-{tag}-{i}", interface=f"cx{tag}{i}", address=f"10.77.0.{i + 1}") for i in (0, 1)]
    clear = ["sh", "-c", CLEAR, "sh", *(machine.namespace for machine in machines)]
    # A session of its own: what ends our process group must not end this.
    guard = subprocess.Popen(clear, stdin=subprocess.PIPE, start_new_session=True)
    try:
        _join(*machines)
        yield machines[0], machines[1]
    finally:
        guard.communicate(timeout=COMMAND_LIMIT_S)


def _join(one: Machine, other: Machine) -> None:
    _run("ip", "netns", "add", one.namespace)
    _run("ip", "netns", "add", other.namespace)
    ends = ["netns", one.namespace, "type", "veth", "peer", "name", other.interface, "netns", other.namespace]
    _run("ip", "link", "add", one.interface, *ends)
    for machine in (one, other):
        own = ("ip", "-n", machine.namespace)
        _run(*own, "addr", "add", f"{machine.address}/24", "dev", machine.interface)
        _run(*own, "link", "set", machine.interface, "up")
        _run(*own, "link", "set", "lo", "up")


def _run(*command: str, may_fail: bool = False) -> str:
    """What the command writes. Raises Unavailable when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{' '.join(command)}` failed: {error}") from None
    if done.returncode and not may_fail:
        raise Unavailable(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
