"""`comfy-xdit bench chaos`: a random fault in each job, and whether the next job works and gives the right numbers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comfy_xdit.pool.client import Pool, PoolError
from comfy_xdit.pool.stop import is_running, stop

from .bench_pool import environment
from .chaos_client import OtherClient
from .chaos_faults import FAULTS, Fault, Scene
from .chaos_jobs import GaveUp, Job, Models, jobs, run_job
from .show import Result, json_argument, show

POOL = "chaos"
LONGEST_DELAY_S = 0.6
"""From the start of a job to its fault: longer than some jobs, which then run again until it comes."""

ROUND_LIMIT_S = 240.0
"""A round that takes longer hangs: the report says so, and the benchmark ends."""

ENDING_LIMIT_S = 10.0
"""How long processes that are no longer the pool's may take to end."""

DISK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One fault. job: "right", "told" (ended with a sentence), "cancelled" or "wrong"; next_job: "right" is the only
    good one. told_s: from the fault to the job's end; healed_s: from the fault's mending to the next job's result.
    orphans: processes of the pool that outlived it.
    """

    fault: str
    ranks: int
    mode: str
    family: str
    job: str
    next_job: str
    told_s: float
    healed_s: float
    orphans: list[int]
    sentence: str

    @property
    def is_good(self) -> bool:
        fine = ("right",) if FAULTS[self.fault].must_end_right else ("right", "told", "cancelled")
        return self.job in fine and self.next_job == "right" and not self.orphans


def chaos(
    num_rounds: int, *, ranks: Sequence[int] = (2, 3), seed: int = 0, faults: Sequence[str] = tuple(FAULTS)
) -> Iterator[Round]:
    """`num_rounds` rounds, shared out over the numbers of ranks. Ends early, by ending the process, at a hang.

    seed: of what happens in which order. Faults that need a disk of their own are left out where none can be made.
    """
    chance = random.Random(seed)
    for number, num_ranks in enumerate(ranks):
        share = (num_rounds + len(ranks) - 1 - number) // len(ranks)
        with _stage(num_ranks) as stage:
            able = [name for name in faults if stage.has_disk or not FAULTS[name].needs_disk]
            for index in range(share):
                # Every fault comes as often as any other; what it meets is left to chance.
                if index % len(able) == 0:
                    chance.shuffle(able)
                yield stage.round(able[index % len(able)], chance)


@contextlib.contextmanager
def _stage(num_ranks: int) -> Iterator[_Stage]:
    with tempfile.TemporaryDirectory(prefix="cx-chaos-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        with _small_disk(home) as has_disk, environment(COMFY_XDIT_HOME=str(home), OMP_NUM_THREADS="1"):
            stage = _Stage(Path(folder), num_ranks, has_disk=has_disk)
            try:
                yield stage
            finally:
                stage.close()


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """Whether `folder` is a disk of DISK_BYTES, which root can make."""
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(folder)]
    mount = shutil.which("mount") if os.getuid() == 0 else None
    is_mounted = mount is not None and subprocess.run([mount, *options], capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


class _Stage:
    """A pool, its models, and one client beside ours."""

    def __init__(self, folder: Path, num_ranks: int, *, has_disk: bool) -> None:
        self.has_disk = has_disk
        self._folder, self._num_ranks = folder, num_ranks
        self._models = Models(folder)
        self._models.write()
        self._jobs = jobs(num_ranks)
        devices = f"cpu:{num_ranks}"
        self._pool = Pool.connect(POOL, devices)
        self._other = OtherClient(folder, POOL, devices)
        self._seen: set[int] = set()

    def close(self) -> None:
        self._other.kill()
        self._pool.close()
        with contextlib.suppress(ConnectionError):
            stop(POOL)

    def round(self, name: str, chance: random.Random) -> Round:
        """Strike once, mend, and run the next job."""
        faulthandler.dump_traceback_later(ROUND_LIMIT_S, exit=True)
        fault, job = FAULTS[name], self._settled(chance.choice(self._jobs))
        # Of the same model, which the fault may have been to.
        following = chance.choice([other for other in self._jobs if other.family == job.family])
        scene = self._scene(job, chance)
        before = self._models.version(job.family)
        if fault.with_other:
            self._other.begin(self._settled(chance.choice(self._jobs)))
        ended, sentence, told_s = self._struck(fault, scene, before)
        if fault.with_other and (other := self._other.end(ROUND_LIMIT_S)) in ("wrong", "hung"):
            ended, sentence = "wrong", f"the other client's job: {other}"
        fault.mend(scene)
        mended = time.monotonic()
        next_job, next_sentence = self._attempt(self._settled(following) if not sentence else following, None)
        if ended == "right" and next_job == "told":
            # It struck when the job had just ended, so the next one met it.
            ended, sentence = next_job, next_sentence
            next_job, next_sentence = self._attempt(self._settled(following), None)
        healed_s = time.monotonic() - mended
        orphans = self._orphans()
        faulthandler.cancel_dump_traceback_later()
        return Round(
            fault=name,
            ranks=self._num_ranks,
            mode=str(job.spec),
            family=job.family,
            job=ended,
            next_job=next_job,
            told_s=told_s,
            healed_s=healed_s,
            orphans=orphans,
            sentence=next_sentence or sentence,
        )

    def _scene(self, job: Job, chance: random.Random) -> Scene:
        with self._pool.lease():
            found = self._pool.status()
        workers = [rank["pid"] for rank in found["ranks"]]
        self._seen |= {found["pid"], *workers}
        return Scene(
            pool_name=POOL,
            models=self._models,
            home=self._folder / "home",
            job=job,
            chance=chance,
            worker_pids=workers,
            supervisor_pid=found["pid"],
            other=self._other,
        )

    def _settled(self, job: Job) -> Job:
        """The job, once it is known what it gives: that of an approximate method is taken from a run at peace."""
        version = self._models.version(job.family)
        if version is not None and not self._models.is_known(job, version):
            self._models.is_right(job, run_job(self._pool, self._models, job), version)
        return job

    def _struck(self, fault: Fault, scene: Scene, version: str | None) -> tuple[str, str, float]:
        """How the job ended that the fault met, its sentence, and how long after the fault."""
        struck: list[float] = []
        delay_s = scene.chance.uniform(0, LONGEST_DELAY_S)

        def strike() -> None:
            time.sleep(delay_s)
            struck.append(time.monotonic())
            fault.strike(scene)

        def poll() -> None:
            if scene.cancelled.is_set():
                raise GaveUp

        thread = threading.Thread(target=strike, name="fault")
        thread.start()
        try:
            while True:
                is_last = not thread.is_alive()
                ended, sentence = self._attempt(scene.job, poll, was=version)
                if ended != "right" or is_last or struck:
                    return ended, sentence, time.monotonic() - struck[0] if struck else 0.0
        finally:
            thread.join()

    def _attempt(self, job: Job, poll: Any, *, was: str | None = None) -> tuple[str, str]:
        """How a job ended, and its sentence. was: the version of its file before, which it may have begun with."""
        try:
            samples = run_job(self._pool, self._models, job, poll=poll)
        except GaveUp:
            return "cancelled", ""
        except (PoolError, FileNotFoundError) as error:
            return "told", str(error)
        for version in dict.fromkeys((self._models.version(job.family), was)):
            if version is not None and self._models.is_right(job, samples, version):
                return "right", ""
        return "wrong", "numbers of no version of the model"

    def _orphans(self) -> list[int]:
        found = self._pool.status()
        now = {found["pid"], *(rank["pid"] for rank in found["ranks"])}
        deadline = time.monotonic() + ENDING_LIMIT_S
        while left := [pid for pid in self._seen - now if is_running(pid)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self._seen = now | set(left)
        return left


def summary(rounds: Sequence[Round]) -> Result:
    """A row for each fault."""
    rows = []
    for name in FAULTS:
        if not (mine := [entry for entry in rounds if entry.fault == name]):
            continue
        ended = [entry.job for entry in mine]
        rows.append(
            {
                "fault": name,
                "rounds": len(mine),
                "right": ended.count("right"),
                "told": ended.count("told") + ended.count("cancelled"),
                "wrong": ended.count("wrong"),
                "next right": sum(entry.next_job == "right" for entry in mine),
                "orphans": sum(len(entry.orphans) for entry in mine),
                "to the end, s": statistics.median(entry.told_s for entry in mine),
                "to the next, s": statistics.median(entry.healed_s for entry in mine),
                "longest, s": max(entry.healed_s for entry in mine),
            }
        )
    return {
        "compared": "jobs that a fault met, and the next job after each: whole runs of every family and mode "
        "against one rank (approximate methods: against the same run at peace)",
        "rows": rows,
        "bad rounds": [dataclasses.asdict(entry) for entry in rounds if not entry.is_good],
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--rounds", type=int, default=100, help="how many faults (default: 100)")
    parser.add_argument("--ranks", default="2,3", help="numbers of CPU ranks, 2 to 4, with commas (default: 2,3)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens in which order (default: 0)")
    parser.add_argument("--only", choices=list(FAULTS), action="append", help="this fault (may be given again)")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; status 1 when a round was bad."""
    ranks = [int(part) for part in args.ranks.split(",")]
    rounds = []
    # The pool and the small disk end with us, also when someone ends us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for entry in chaos(args.rounds, ranks=ranks, seed=args.seed, faults=args.only or tuple(FAULTS)):
        rounds.append(entry)
        mark = "" if entry.is_good else "BAD "
        sys.stderr.write(
            f"{mark}{len(rounds)}: {entry.fault}, {entry.family} {entry.mode}: {entry.job} after {entry.told_s:.1f} s, "
            f"next {entry.next_job} after {entry.healed_s:.1f} s{'; ' if entry.sentence else ''}{entry.sentence}\n"
        )
        sys.stderr.flush()
    result = summary(rounds)
    show(result, as_json=args.json)
    return 1 if result["bad rounds"] else 0
