"""Euler's method as a program for the workers, and runs of it, for benchmarks that have no ComfyUI."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.messages import Sample
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.sampler_recorder import SamplerRecorder
from comfy_xdit.trajectory import SamplerProgram

GUIDANCE = 2.0
"""Of the prompt over nothing, where a run has both."""


def whole_run(
    model: str,
    call: dict[str, Any],
    spec: ParallelSpec,
    *,
    num_evaluations: int,
    chunks: int = 1,
    timesteps: float = 1.0,
    **options: Any,
) -> Sample:
    """A sampling run by Euler's method from a call's noise and conditioning.

    call: as `checkpoint.random_call`; its rows are `chunks` (1, or 2 for cond and uncond) of all images.
    timesteps: what the model calls noise level 1.
    options: other fields of `Sample`.
    """
    noise = call["x"][: call["x"].shape[0] // chunks]
    rows = {name: value.chunk(chunks) for name, value in call.items() if name not in ("x", "timestep")}
    return Sample(
        job="bench",
        model=model,
        patches_id="",
        spec=spec,
        program=euler(num_evaluations, cfg=GUIDANCE if chunks == 2 else None, timesteps=timesteps),
        noise=noise,
        latent=torch.zeros_like(noise),
        mask=None,
        noises=[],
        conds=[{name: parts[chunk] for name, parts in rows.items()} for chunk in range(chunks)],
        **options,
    )


def euler(num_steps: int, *, cfg: float | None = None, timesteps: float = 1.0) -> SamplerProgram:
    """Of a model that predicts noise minus image, from noise level 1 to 0 in even steps.

    timesteps: what the model calls level 1. cfg: the guidance of "positive" over "negative", which are then
    evaluated side by side; None: "positive" alone.
    """
    levels = [1 - step / num_steps for step in range(num_steps)] + [0.0]
    conds = ["positive"] if cfg is None else ["positive", "negative"]
    recorder = SamplerRecorder()
    x: Tensor = recorder.value("noise")
    for number, (level, lower) in enumerate(pairwise(levels)):
        outputs: list[Tensor] = [*recorder.call(x, sigma=level, timestep=level * timesteps, conds=range(len(conds)))]
        velocity = outputs[0] if cfg is None else outputs[1] + cfg * (outputs[0] - outputs[1])
        recorder.preview(number + 1, num_steps, x - level * velocity)
        x = x + (lower - level) * velocity
    return recorder.program(conds, x)
