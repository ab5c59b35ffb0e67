"""Pictures from the tiny Flux through a pool: Euler's method, one `Denoise` per step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from comfy_xdit.messages import (
    Denoise,
    Drop,
    Held,
    Hold,
    LoadModel,
    LoadVAE,
    Message,
    Patch,
    Result,
    SetPatches,
    VAEDecode,
)
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.timeline.job import JobReport, Step

from . import assets, conditioning

MODEL_KEY = "tiny-flux"
VAE_KEY = "tiny-flux-vae"
DTYPE = "float32"
"""Differences between modes are then those of the order of sums alone."""


class Ranks(Protocol):
    """What sampling needs of a pool."""

    def call_all(self, message: Message) -> list[Result]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every picture is made with. side: pixels, a multiple of 16."""

    prompts: tuple[str, ...]
    seed: int = 5
    num_steps: int = 20
    cfg: float = 2.5
    side: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(JobReport):
    """latents: [prompts, 16, side / 8, side / 8], unscaled; each step is one `Denoise`."""

    latents: Tensor


def load_model(ranks: Ranks, spec: ParallelSpec | None = None) -> None:
    """Make the demo's model resident, spread for `spec`."""
    ranks.call_all(
        LoadModel(
            model=MODEL_KEY,
            path=str(assets.MODEL),
            prefix="",
            family="flux",
            storage_dtype=DTYPE,
            compute_dtype=DTYPE,
            spec=spec or ParallelSpec(),
        )
    )


def load_vae(ranks: Ranks) -> None:
    """Make the demo's VAE resident."""
    ranks.call_all(LoadVAE(vae=VAE_KEY, path=str(assets.VAE), dtype=DTYPE))


def sample(
    ranks: Ranks,
    settings: Settings,
    spec: ParallelSpec,
    *,
    patches_id: str = "",
    patches: Sequence[Patch] = (),
    trace: bool = False,
) -> Sampled:
    """All prompts at once, with these patches on the model. Inside one lease: what is held ends with it.

    trace: the steps' reports list every collective.
    """
    ranks.call_all(SetPatches(model=MODEL_KEY, patches_id=patches_id, patches=list(patches)))
    groups = by_length(settings.prompts)
    held = []
    for length, prompts in groups.items():
        held.append({key: Held(name=f"demo-{length}-{key}") for key in ("context", "y")})
        for key, value in _guided(prompts).items():
            ranks.call_all(Hold(name=held[-1][key].name, value=value))
    noise = torch.Generator().manual_seed(settings.seed)
    side = settings.side // assets.PIXELS
    latents = torch.randn(len(settings.prompts), assets.CHANNELS, side, side, generator=noise)
    places = [[settings.prompts.index(prompt) for prompt in prompts] for prompts in groups.values()]
    begin, steps = time.perf_counter(), []
    for level, lower in pairwise(torch.linspace(1, 0, settings.num_steps + 1).tolist()):
        started = time.perf_counter() - begin
        calls = list(_calls(latents, level, held, places))
        message = Denoise(
            model=MODEL_KEY, patches_id=patches_id, spec=spec, calls=calls, chunks=[2] * len(calls), trace=trace
        )
        results = ranks.call_all(message)
        for place, out in zip(places, results[0].value, strict=True):
            latents[place] += (lower - level) * _guide(out.float(), settings.cfg)
        reports = tuple(result.report for result in results)
        steps.append(Step(begin=started, end=time.perf_counter() - begin, reports=reports))
    ranks.call_all(Drop(names=[value.name for values in held for value in values.values()]))
    unscaled = latents / assets.SCALE + assets.SHIFT
    return Sampled(latents=unscaled, seconds=steps[-1].end, steps=tuple(steps), began=begin)


def decode(ranks: Ranks, latents: Tensor) -> Tensor:
    """[batch, 3, side, side] in about -1..1."""
    image: Tensor = ranks.call_all(VAEDecode(vae=VAE_KEY, latent=latents))[0].value
    return image


def by_length(prompts: Sequence[str]) -> dict[int, list[str]]:
    """Prompts of one length make one batch; those of different lengths are separate calls of the model."""
    groups: dict[int, list[str]] = {}
    for prompt in prompts:
        context, _ = conditioning.load(str(assets.CONDITIONING), prompt)
        groups.setdefault(context.shape[1], []).append(prompt)
    return groups


def _guided(prompts: Sequence[str]) -> dict[str, Tensor]:
    """The conditioning of the prompts, then as much of nothing for the unconditional half of the batch."""
    loaded = [conditioning.load(str(assets.CONDITIONING), prompt) for prompt in prompts]
    context = torch.cat([context for context, _ in loaded])
    pooled = torch.cat([pooled for _, pooled in loaded if pooled is not None])
    return {
        "context": torch.cat([context, torch.zeros_like(context)]),
        "y": torch.cat([pooled, torch.zeros_like(pooled)]),
    }


def _calls(
    latents: Tensor, level: float, held: list[dict[str, Held]], places: list[list[int]]
) -> Iterator[dict[str, Any]]:
    for values, place in zip(held, places, strict=True):
        x = latents[place].repeat(2, 1, 1, 1)
        yield {"x": x, "timestep": torch.full((x.shape[0],), level), **values}


def _guide(out: Tensor, cfg: float) -> Tensor:
    cond, uncond = out.chunk(2)
    return uncond + cfg * (cond - uncond)
