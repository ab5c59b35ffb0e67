"""A pool of a benchmark's own, and the same model in this process beside it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.messages import Denoise, LoadModel, Result, Sample
from comfy_xdit.models.resident import ResidentModel, load
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.denoise import denoise
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.sample import sample
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool

from .checkpoint import FluxSize, write_flux


@contextlib.contextmanager
def bench_pool(num_ranks: int) -> Iterator[Pool]:
    """A pool of CPU ranks with one thread each, in a folder of its own; stopped at the end, also after an error."""
    from comfy_xdit.pool.stop import stop

    with tempfile.TemporaryDirectory(prefix="comfy-xdit-bench-") as folder, environment(
        COMFY_XDIT_HOME=folder, OMP_NUM_THREADS="1"
    ):
        pool = Pool.connect("bench", f"cpu:{num_ranks}")
        try:
            yield pool
        finally:
            pool.close()
            stop("bench")


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """The pool's processes inherit these; ours gets its own back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Contest:
    """One random Flux, in this process and on a pool.

    folder: where the checkpoint is written; it must outlive the contest.
    """

    def __init__(self, folder: Path, size: FluxSize) -> None:
        self.size = size
        self.message = LoadModel(
            model="bench",
            path=str(write_flux(folder / "bench.safetensors", size)),
            prefix="",
            family="flux",
            storage_dtype="float32",
            compute_dtype="float32",
        )
        self.model: ResidentModel = load(self.message, "cpu")
        self._groups = GroupCache(1)

    def in_process(self, call: dict[str, Tensor], *, chunks: int = 1, num_threads: int = 1) -> Tensor:
        """The output on this process's own threads."""
        torch.set_num_threads(num_threads)
        with torch.inference_mode(), ParallelContext(ParallelSpec(), self._groups) as context:
            outputs, _ = denoise(self.model, [call], [chunks], context)
        assert outputs is not None
        return outputs[0]

    def run_in_process(self, message: Sample, *, num_threads: int = 1) -> Tensor:
        """What the whole run gives on this process's own threads."""
        torch.set_num_threads(num_threads)
        return run_here(self.model, message)

    def on_pool(self, pool: Pool, call: dict[str, Any], spec: ParallelSpec, *, chunks: int = 1) -> Result:
        """The pool's answer: value [output], report of rank 0."""
        return pool.call(
            Denoise(model="bench", patches_id="", spec=spec, calls=[call], chunks=[chunks]), timeout_s=3600
        )


def run_here(model: ResidentModel, message: Sample) -> Tensor:
    """What a whole run gives on one rank, which this process is; the message's degrees don't count."""
    with torch.inference_mode(), ParallelContext(ParallelSpec(), GroupCache(1)) as context:
        samples, _ = sample(model, message, message.conds, context, post=lambda entry: None, wish_to_stop=lambda: False)
    assert samples is not None
    return samples


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest value."""
    return ((output - reference).abs().max() / reference.abs().max()).item()
