"""How far a run on the pool is from ComfyUI's own, for every sampler of the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy_xdit_bench.modes import is_exact, title
from comfy_xdit_nodes.parity import models
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.pool import PoolSetting
from torch import Tensor

from comfy_xdit.parallel.spec import ParallelSpec, check

LIMIT = 1e-4
"""Largest difference that counts as equal, in fp32, relative to the largest number of the latent."""

ALL = 10_000
"""More evaluations than any run has."""

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "cfg=2": (2, {"cfg": 2}),
    "cfg=2, step by step": (2, {"cfg": 2, "sampling": "step"}),
    "ulysses=2": (2, {"ulysses": 2}),
    "ring=2": (2, {"ring": 2}),
    "cfg=2, ulysses=2": (4, {"cfg": 2, "ulysses": 2}),
    "ulysses=2, ring=2": (4, {"ulysses": 2, "ring": 2}),
    "tensor=2": (2, {"tensor": 2}),
    "pipe=2, all exact": (2, {"pipe": 2, "warmup_steps": ALL}),
    "distri=2, all exact": (2, {"distri": 2, "warmup_steps": ALL}),
}
"""Label → ranks, and what a PoolSetting says about them: measured with every sampler."""

KINDS = ("sd3", "flux", "pixart")

SAMPLERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde")
"""Those that every mode is measured with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """error: largest difference to stock over the largest number of stock's latent."""

    kind: str
    case: str
    sampler: str
    scheduler: str
    error: float


class Parity:
    """Runs of stock, kept, and of pools against them.

    folder: of the tiny models (`models.write_all`). Must be used in inference mode.
    """

    def __init__(self, folder: Path) -> None:
        self._stock = {kind: models.load(folder / f"{kind}.safetensors") for kind in KINDS}
        self._latents: dict[tuple[str, str], Tensor] = {}

    def measure(self, kind: str, case: str, samplers: Collection[str] | None = None) -> Iterator[Measured]:
        """One result for each sampler; the host's schedulers take turns, so that each one is met."""
        num_ranks, choices = CASES[case]
        yield from self._measured(kind, case, setting_of(num_ranks, **choices), samplers)

    def measure_mode(self, kind: str, spec: ParallelSpec) -> Iterator[Measured]:
        """The same of a mode with `SAMPLERS`, all evaluations exact; nothing where the model is too small for it."""
        shape = parallelize(self._stock[kind], setting_of(1)).model.checkpoint.shape
        if not check(spec, num_ranks=spec.num_ranks, shape=shape):
            warmup = {} if is_exact(spec) else {"warmup_steps": ALL}
            setting = setting_of(spec.num_ranks, **spec.degrees, **warmup)
            yield from self._measured(kind, title(spec), setting, SAMPLERS)

    def _measured(
        self, kind: str, case: str, setting: PoolSetting, samplers: Collection[str] | None
    ) -> Iterator[Measured]:
        model = parallelize(self._stock[kind], setting)
        for sampler, scheduler in pairs():
            if samplers is not None and sampler not in samplers:
                continue
            stock = self._stock_latent(kind, sampler, scheduler)
            ours = run(model, kind, sampler, scheduler)
            error = (ours - stock).abs().max() / stock.abs().max()
            yield Measured(kind=kind, case=case, sampler=sampler, scheduler=scheduler, error=error.item())

    def _stock_latent(self, kind: str, sampler: str, scheduler: str) -> Tensor:
        if (kind, sampler) not in self._latents:
            self._latents[kind, sampler] = run(self._stock[kind], kind, sampler, scheduler)
        return self._latents[kind, sampler]


def setting_of(num_ranks: int, **choices: Any) -> PoolSetting:
    """The pool of CPU workers with so many ranks."""
    return PoolSetting(name=f"ranks{num_ranks}", devices=f"cpu:{num_ranks}", **choices)


def pairs() -> list[tuple[str, str]]:
    """Every sampler of the host, each with one of its schedulers."""
    schedulers = comfy.samplers.KSampler.SCHEDULERS
    return [(name, schedulers[i % len(schedulers)]) for i, name in enumerate(comfy.samplers.KSampler.SAMPLERS)]


def run(model: Any, kind: str, sampler: str, scheduler: str) -> Tensor:
    """Three steps at cfg 3 on an odd size: 15 by 10 patches (PixArt 19), so that no degree divides the tokens."""
    latent = models.latent(30, 20)
    latent["samples"] = latent["samples"] + torch.linspace(-1, 1, 20)
    changes = {"sampler_name": sampler, "scheduler": scheduler, "latent_image": latent, "denoise": 0.9}
    return models.sample(model, **models.fitted(kind, changes))
