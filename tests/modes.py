"""The jobs of the parity matrix: one run and one evaluation of a tiny model of each family, with any degrees."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from comfy_xdit_bench.modes import is_exact
from programs import flow_program
from ranks import groups, tiny_call
from staged import sampling_job, spread_model

from comfy_xdit.messages import Sample
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.denoise import denoise
from comfy_xdit.parallel.sample import sample
from comfy_xdit.parallel.spec import ParallelSpec

KINDS: dict[str, dict[str, Any]] = {
    "flux": {"family": "flux"},
    "sd3.5": {"family": "sd3", "dual": True},
    "pixart": {"family": "pixart", "alpha": True},
}
TEXTS = {"flux": (9, 9), "sd3.5": (9, 8), "pixart": (9, 9)}
"""Of cond and uncond: one batch, or two."""

SIZES = {"flux": (11, 10), "sd3.5": (11, 10), "pixart": (6, 10)}
"""Of latents: 30 tokens, and 93 for PixArt, which has no positions for fewer."""

NUM_PATCHES = 3
METHODS: dict[str, tuple[torch.dtype, int, dict[str, Any]]] = {
    "exact": (torch.float32, 2, {"stale": False}),
    "old keys": (torch.float64, 3, {"num_patches": NUM_PATCHES, "warmup_steps": 1}),
}
"""Dtype, evaluations, and fields of a `Sample`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run, as far as a spec makes a difference to it. heads: 6 for three ranks, blocks: 8 for as many stages,
    since tensor parallel and stages want them; images: three where they are dealt."""

    kind: str
    heads: int
    blocks: int
    images: int

    @classmethod
    def of(cls, kind: str, spec: ParallelSpec) -> Job:
        heads, blocks = 6 if spec.tensor == 3 else 8, 8 if spec.pipe == 8 else 4
        return cls(kind=kind, heads=heads, blocks=blocks, images=3 if spec.dp > 1 else 1)

    def model(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of `tiny_model`; Flux has two kinds of blocks."""
        layers = self.blocks // 2 if self.kind == "flux" else self.blocks
        return {**KINDS[self.kind], "heads": self.heads, "layers": layers, "dtype": dtype}

    def fields(self, method: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Of a `Sample`: evaluations with cfg, each image with conditionings of its own."""
        wanted, steps, _ = METHODS[method]
        program = flow_program(steps=steps, cfg=2.5, kind="multistep")
        # Random numbers of one dtype, so that both mean the same job.
        sizes = {"size": SIZES[self.kind], "batch": self.images, "texts": TEXTS[self.kind]}
        job = sampling_job(self.model(torch.float64), program, **sizes)
        conds = [
            {name: torch.cat([value + 0.1 * row for row in range(self.images)]) for name, value in cond.items()}
            for cond in job["conds"]
        ]
        return cast({**job, "conds": conds}, dtype or wanted)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return [cast(item, dtype) for item in value] if isinstance(value, list) else value


def run_mode(spec: ParallelSpec, job: Job) -> dict[str, Any]:
    """Job: what rank 0 has of runs by `METHODS`, and of one evaluation; None on other ranks.

    Exact methods take a run's evaluations as they take single ones.
    """
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in ["exact"] if is_exact(spec) else [*METHODS]:
            dtype, _, method = METHODS[name]
            model = spread_model(spec, groups().rank, **job.model(dtype))
            message = Sample(job="j", model="m", patches_id="", spec=spec, **job.fields(name), **method)
            with ParallelContext(spec, groups()) as context:
                found[name], _ = sample(
                    model, message, message.conds, context, post=lambda entry: None, wish_to_stop=lambda: False
                )
        if not is_exact(spec):
            with ParallelContext(spec, groups()) as context:
                outputs, _ = denoise(spread_model(spec, groups().rank, **job.model()), [call_of(job)], [2], context)
            found["one evaluation"] = outputs and outputs[0]
    return found


def call_of(job: Job) -> dict[str, Any]:
    return tiny_call(KINDS[job.kind]["family"], seed=0, batch=2 * job.images, size=SIZES[job.kind], text=9)
