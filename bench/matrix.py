"""N ranks against one, for each family and mode: exact ones, and how far the approximate ones drift."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from comfy_xdit.messages import LoadModel, Sample
from comfy_xdit.models.resident import load
from comfy_xdit.parallel.spec import ParallelSpec, check
from comfy_xdit.pool.client import Pool

from .bench_pool import bench_pool, relative_difference, run_here
from .modes import is_exact, modes, title
from .program import whole_run
from .wire import SUBJECTS

NUM_STEPS, IMAGES = 8, 3
TIMESTEPS = {"flux": 1.0}
"""What a family calls noise level 1, where it isn't 1000."""

MODEL = "matrix"


def against_one_rank(num_ranks: int, families: Sequence[str] = tuple(SUBJECTS)) -> Iterator[dict[str, Any]]:
    """kind, mode, ranks; error: of the mode, of all evaluations exact, against one rank of this process.

    drift and psnr_db: of an approximate mode with one exact evaluation, against one rank, else None. Errors are the
    largest difference over the largest number of the latent; decibels are of the latent's range.
    """
    with tempfile.TemporaryDirectory() as folder, bench_pool(num_ranks) as pool, pool.lease():
        for family in families:
            path = SUBJECTS[family].write(Path(folder) / f"{family}.safetensors")
            message = LoadModel(
                model=MODEL,
                path=str(path),
                prefix="",
                family=family,
                storage_dtype="float32",
                compute_dtype="float32",
            )
            whole = load(message, "cpu")
            exact = run_here(whole, run_of(family, ParallelSpec()))
            for spec in modes(num_ranks):
                if not check(spec, num_ranks=num_ranks, shape=whole.shape):
                    yield {"kind": family, "mode": title(spec), "ranks": num_ranks} | _measured(
                        pool, dataclasses.replace(message, spec=spec), spec, exact
                    )


def _measured(pool: Pool, load_message: LoadModel, spec: ParallelSpec, exact: Tensor) -> dict[str, Any]:
    pool.call(load_message)

    def run(warmup_steps: int) -> Tensor:
        return pool.call(run_of(load_message.family, spec, warmup_steps=warmup_steps)).value

    result: dict[str, Any] = {"error": relative_difference(run(NUM_STEPS), exact), "drift": None, "psnr_db": None}
    if not is_exact(spec):
        near = run(1)
        result |= {"drift": relative_difference(near, exact), "psnr_db": psnr_db(near, exact)}
    return result


def run_of(family: str, spec: ParallelSpec, **options: Any) -> Sample:
    """A run with guidance, of more images than ranks divide."""
    call = SUBJECTS[family].call(2 * IMAGES)
    timesteps = TIMESTEPS.get(family, 1000.0)
    return whole_run(MODEL, call, spec, num_evaluations=NUM_STEPS, chunks=2, timesteps=timesteps, **options)


def psnr_db(near: Tensor, exact: Tensor) -> float:
    """Peak signal to noise, the peak being the range of `exact`; infinite when equal."""
    noise = float((near - exact).square().mean())
    return 10 * math.log10(float(exact.max() - exact.min()) ** 2 / noise) if noise else math.inf
