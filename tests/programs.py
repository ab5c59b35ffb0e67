"""Samplers written out, and the programs that the recorder makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from comfy_xdit.sampler_recorder import SamplerRecorder
from comfy_xdit.trajectory import SamplerProgram


def levels(steps: int) -> Iterator[tuple[float, float]]:
    """Each step's noise level and the next one's, from 1 to 0."""
    return itertools.pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist())


def guided(recorder: SamplerRecorder, x: Tensor, sigma: float, cfg: float) -> tuple[Tensor, Tensor]:
    """A flow model's denoised latent, and that of its last conditioning alone."""
    outputs = recorder.call(x, sigma=sigma, timestep=sigma, conds=[0, 1] if cfg != 1 else [0])
    denoised = [x - output * sigma for output in outputs]
    return denoised[-1] + (denoised[0] - denoised[-1]) * cfg if cfg != 1 else denoised[0], denoised[-1]


def named(cfg: float) -> list[str]:
    return ["positive", "negative"] if cfg != 1 else ["positive"]


def flow_program(*, steps: int, cfg: float = 1.0, kind: str = "euler", noisy: bool = False) -> SamplerProgram:
    """Euler or two-step multistep on a flow model, from sigma 1 to 0; noisy adds fresh noise in each step.

    With cfg the calls have two conditionings, "positive" and "negative".
    """
    recorder = SamplerRecorder()
    x: Tensor = recorder.value("noise")
    before: Tensor | None = None
    for step, (sigma, lower) in enumerate(levels(steps)):
        denoised, _ = guided(recorder, x, sigma, cfg)
        recorder.preview(step + 1, steps, denoised)
        kept = lower / sigma
        ahead = denoised if kind == "euler" or before is None else 1.5 * denoised - 0.5 * before
        x, before = kept * x + (1.0 - kept) * ahead, denoised
        if noisy and step + 1 < steps:
            x = x + 0.1 * recorder.value(f"n{step}")
    return recorder.program(named(cfg), x)


def heun_program(*, steps: int, cfg: float) -> SamplerProgram:
    """Two evaluations for each step but the last: there and back, the mean of both slopes is taken."""
    recorder = SamplerRecorder()
    x: Tensor = recorder.value("noise")
    for step, (now, then) in enumerate(levels(steps)):
        denoised, _ = guided(recorder, x, now, cfg)
        recorder.preview(step + 1, steps, denoised)
        slope = (x - denoised) / now
        there = x + slope * (then - now)
        if then == 0:
            x = there
            continue
        denoised, _ = guided(recorder, there, then, cfg)
        x = x + (slope + (there - denoised) / then) / 2 * (then - now)
    return recorder.program(named(cfg), x)


def lonely_program(*, steps: int, cfg: float) -> SamplerProgram:
    """Euler whose middle steps do without the negative conditioning."""
    return _euler(steps, lambda step: 1.0 if step in (2, 3) else cfg, plus=False)


def plus_program(*, steps: int, cfg: float) -> SamplerProgram:
    """Euler of the CFG++ kind: noise is put back along the negative conditioning's own direction."""
    return _euler(steps, lambda step: cfg, plus=True)


def _euler(steps: int, cfg_at: Callable[[int], float], *, plus: bool) -> SamplerProgram:
    recorder = SamplerRecorder()
    x: Tensor = recorder.value("noise")
    for step, (sigma, lower) in enumerate(levels(steps)):
        denoised, negative = guided(recorder, x, sigma, cfg_at(step))
        recorder.preview(step + 1, steps, denoised)
        x = denoised + (x - (negative if plus else denoised)) * (lower / sigma)
    return recorder.program(["positive", "negative"], x)
