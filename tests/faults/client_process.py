"""Another client of the test pool, in a process of its own; says on standard output how far it is."""

from __future__ import annotations

import runpy
import signal
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
runpy.run_path(str(HERE.parent.parent / "comfy_xdit" / "mount.py"))["mount"](
    "comfy_xdit", "comfy_xdit_worker"
)

from fault_service import Echo, Keep, Sleep  # noqa: E402
from harness import NAME, OPTIONS  # noqa: E402

from comfy_xdit.messages import Message, Status  # noqa: E402
from comfy_xdit.pool.client import Pool, PoolError  # noqa: E402


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell(pool: Pool, message: Message) -> None:
    """Say in which words `message` fails."""
    try:
        pool.call(message)
    except PoolError as error:
        say(f"told {error}")


def main(action: str) -> None:
    continued = threading.Event()
    signal.signal(signal.SIGCONT, lambda *_: continued.set())
    pool = Pool.connect(NAME, "cpu:2", **OPTIONS)
    say(f"connected {pool.status()['pid']}")
    if action == "connect":
        return
    if action == "keep":
        pool.call(Keep(name="kept"))
    with pool.lease():
        say("lease")
        if action == "sleep":
            pool.call(Sleep(seconds=20.0))
        if action == "slow":
            pool.call(Sleep(seconds=1.0))
        if action == "hold":
            sys.stdin.readline()
        if action == "between jobs":
            # Until it was stopped, and goes on. The signal may meet another thread, which does not wake this one.
            while not continued.wait(0.1):
                pass
            tell(pool, Echo(value="late"))
        if action == "in a job":
            tell(pool, Status())
    pool.call(Echo(value=1))
    say("done")


if __name__ == "__main__":
    main(sys.argv[1])
