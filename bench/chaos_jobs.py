"""The jobs of `bench chaos`: tiny models of each family, what a run of them gives on one rank, and runs on a pool."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_xdit.messages import Cancel, LoadModel, Sample
from comfy_xdit.models.resident import load
from comfy_xdit.parallel.spec import ParallelSpec, check
from comfy_xdit.pool.client import Pool
from comfy_xdit.weights.stamp import stamp

from .bench_pool import relative_difference, run_here
from .modes import modes
from .program import whole_run
from .wire import SUBJECTS

NUM_STEPS = 16
TIMESTEPS = {"flux": 1.0}
"""What a family calls noise level 1, where it isn't 1000."""

TOLERANCE = 1e-5
"""Of a whole run against one rank; of one of an approximate method against the same run on a pool at peace."""

CALL_LIMIT_S = 60.0
VERSIONS = ("first", "second")
"""Of each model's weights: a file is replaced by the other one."""


class GaveUp(Exception):
    """The user pressed Cancel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run of one family. is_exact: whether approximate methods reuse nothing, and so equal one rank."""

    family: str
    spec: ParallelSpec
    is_exact: bool

    def message(self) -> Sample:
        """Of one image, with guidance."""
        run = whole_run(
            self.family,
            SUBJECTS[self.family].call(2),
            self.spec,
            num_evaluations=NUM_STEPS,
            chunks=2,
            timesteps=TIMESTEPS.get(self.family, 1000.0),
            warmup_steps=NUM_STEPS if self.is_exact else 1,
        )
        # Workers remember which jobs were cancelled.
        return dataclasses.replace(run, job=uuid.uuid4().hex)


def jobs(num_ranks: int) -> list[Job]:
    """Every mode of `num_ranks` ranks that a family allows; the approximate ones both ways."""
    found = []
    for family in SUBJECTS:
        for spec in modes(num_ranks):
            if not check(spec, num_ranks=num_ranks):
                approximates = spec.pipe > 1 or spec.distri > 1
                found += [Job(family=family, spec=spec, is_exact=exact) for exact in (True, *[False] * approximates)]
    return found


class Models:
    """The files of all families below `folder`, each of which may be replaced by another version."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wanted: dict[tuple[Job, str], Tensor] = {}

    def write(self) -> None:
        """Make every file; once, by the first process."""
        for family, subject in SUBJECTS.items():
            first = subject.write(self._kept(family, VERSIONS[0]))
            # Not a power of two: with the same rounding everywhere, outputs could differ by a factor alone.
            changed = {key: weight * 0.9 if weight.ndim == 2 else weight for key, weight in load_file(first).items()}
            save_file(changed, self._kept(family, VERSIONS[1]))
            self.restore(family, VERSIONS[0])

    def path(self, family: str) -> Path:
        """The file that the pool is told of."""
        return self._folder / f"{family}.safetensors"

    def _kept(self, family: str, version: str) -> Path:
        return self._folder / f"{family}-{version}.safetensors"

    def version(self, family: str) -> str | None:
        """Which version the file is; None for neither, or no file."""
        try:
            found = self.path(family).read_bytes()
        except FileNotFoundError:
            return None
        return next((name for name in VERSIONS if self._kept(family, name).read_bytes() == found), None)

    def restore(self, family: str, version: str) -> None:
        """Put a version in the file's place, as a download does: whole, by a rename."""
        new = self.path(family).with_suffix(".new")
        new.write_bytes(self._kept(family, version).read_bytes())
        os.replace(new, self.path(family))

    def overwrite(self, family: str, version: str) -> None:
        """Write a version into the file that is there, as a copy does."""
        self.path(family).write_bytes(self._kept(family, version).read_bytes())

    def load_message(self, job: Job) -> LoadModel:
        """What a client sends before the job. Raises FileNotFoundError where the file is gone."""
        path = str(self.path(job.family))
        return dataclasses.replace(_loading(job, path), spec=job.spec, stamp=stamp(path))

    def is_right(self, job: Job, samples: Tensor, version: str) -> bool:
        """Whether a run of `version` ends so. The first of an approximate job decides what its later ones are."""
        found = self._wanted.get((job, version))
        if found is None:
            found = samples if not job.is_exact else self._on_one_rank(job, version)
            self._wanted[job, version] = found
        return relative_difference(samples, found) <= TOLERANCE

    def is_known(self, job: Job, version: str) -> bool:
        return job.is_exact or (job, version) in self._wanted

    def _on_one_rank(self, job: Job, version: str) -> Tensor:
        torch.set_num_threads(1)
        return run_here(load(_loading(job, str(self._kept(job.family, version))), "cpu"), job.message())


def _loading(job: Job, path: str) -> LoadModel:
    """Of the job's model from `path`, for one rank."""
    return LoadModel(
        model=job.family,
        path=path,
        prefix="",
        family=job.family,
        storage_dtype="float32",
        compute_dtype="float32",
    )


def run_job(pool: Pool, models: Models, job: Job, *, poll: Callable[[], Any] | None = None) -> Tensor:
    """What a client of the pool does for one run. Raises PoolError; FileNotFoundError; and what `poll` raises."""
    with pool.lease(poll):
        pool.call(models.load_message(job), poll=poll, timeout_s=CALL_LIMIT_S)
        message = job.message()
        try:
            samples = pool.call(message, poll=poll, timeout_s=CALL_LIMIT_S).value
        except GaveUp:
            pool.aside(Cancel(job=message.job))
            raise
    assert isinstance(samples, Tensor)
    return samples
