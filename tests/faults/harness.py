"""Pools of the tests' own: a private folder, two CPU ranks, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.pool.client import Pool, PoolError
from comfy_xdit.pool.stop import is_running, stop

NAME = "test"
HERE = Path(__file__).resolve().parent
OPTIONS: dict[str, Any] = {"service": "fault_service:FaultService", "path": (str(HERE),)}
WAIT_S = 120.0


@contextlib.contextmanager
def private_home() -> Iterator[Path]:
    """A folder for pools, given to this process and its children; every pool in it ends with the block."""
    # Not pytest's tmp_path: a socket's path may have 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="cx-", dir="/tmp"))
    before = os.environ.get("COMFY_XDIT_HOME")
    os.environ["COMFY_XDIT_HOME"] = str(home)
    try:
        yield home
    finally:
        for folder in home.iterdir():
            if folder.is_dir():
                with contextlib.suppress(ConnectionError, PoolError):
                    stop(folder.name)
        os.environ.pop("COMFY_XDIT_HOME")
        if before is not None:
            os.environ["COMFY_XDIT_HOME"] = before
        shutil.rmtree(home)


@contextlib.contextmanager
def private_pool(devices: str = "cpu:2", **options: Any) -> Iterator[Pool]:
    """A pool that runs the test service."""
    with private_home():
        pool = Pool.connect(NAME, devices, **{**OPTIONS, **options})
        try:
            yield pool
        finally:
            pool.close()


@contextlib.contextmanager
def client_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another client: `client_process.py` with `arguments`; killed at the end of the block."""
    command = [sys.executable, str(HERE / "client_process.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str], word: str) -> str:
    """The rest of the next line of `process`, which must begin with `word`."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith(word), f"the client process said {line!r}, not {word!r}"
    return line[len(word) :].strip()


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` gives once it is true; fails the test when that never comes."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


def worker_pids(pool: Pool) -> list[int]:
    return [rank["pid"] for rank in pool.status()["ranks"]]


def thread_states(pid: int) -> list[str]:
    """The state of each thread of a process, as proc_pid_stat(5) has it."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads]


def stop_process(pid: int) -> None:
    """Have it stand still, and return when it does."""
    os.kill(pid, signal.SIGSTOP)
    # Its threads stop one after the other.
    wait_until(lambda: set(thread_states(pid)) == {"T"}, f"process {pid} to stand still")


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_running, pids)), f"the end of {pids}")
