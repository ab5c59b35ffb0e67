"""The other client of `bench chaos`: a process that runs jobs on the same pool, one after another, and checks them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from comfy_xdit.mount import BOOT
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool, PoolError

from .chaos_jobs import Job, Models, run_job


class OtherClient:
    """Its process, started when first needed, and anew after it was killed."""

    def __init__(self, folder: Path, pool_name: str, devices: str) -> None:
        self._arguments = [str(folder), pool_name, devices]
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def begin(self, job: Job) -> None:
        """Have it run `job`; returns at once."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(BOOT), __name__, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._read(120.0)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        self._process.stdin.flush()

    def end(self, limit_s: float) -> str:
        """How its job ended, as `outcome`; "killed" when the process was; "hung" after `limit_s`."""
        line = self._read(limit_s)
        if not line and self._process is not None:
            self.kill()
        return line or "killed"

    def _read(self, limit_s: float) -> str:
        if self._process is None:
            return ""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            return "hung"
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def outcome(pool: Pool, models: Models, job: Job) -> str:
    """ "right", "wrong", or "told" and the sentence."""
    try:
        samples = run_job(pool, models, job)
    except (PoolError, FileNotFoundError) as error:
        return f"told {error}"
    version = models.version(job.family)
    # Of an approximate job this process may not know yet what is right; the round's own client does.
    if version is None or not models.is_known(job, version):
        return "right"
    return "right" if models.is_right(job, samples, version) else "wrong"


def main() -> None:
    """Jobs come as JSON lines on standard input."""
    folder, pool_name, devices = sys.argv[1:]
    models = Models(Path(folder))
    pool = Pool.connect(pool_name, devices)
    _say("ready")
    for line in sys.stdin:
        fields = json.loads(line)
        job = Job(**{**fields, "spec": ParallelSpec(**fields["spec"])})
        _say(outcome(pool, models, job).replace("\n", " "))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
