"""A tiny model of a family's real class, and calls that use each argument that the family names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Config = dict[str, Any]
Call = dict[str, Any]

OFF = -1e9
"""What an additive mask gives a token that nobody sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a family is tested on.

    kind: ComfyUI's configuration class. config: the transformer's configuration as ComfyUI's detection gives it, of
    few and small blocks, and of heads that no degree divides.
    small: entries of `config` that stay when a real file's configuration is taken: its sizes. All else is then the
    file's.
    calls: what ComfyUI's model passes to the transformer of such a configuration: "x" and "timestep", which go by
    place, and the rest by name. refused: calls that must raise InputError on several ranks, by the plan's own words.
    """

    kind: str
    config: Config
    small: tuple[str, ...]
    calls: Callable[[Config], dict[str, Call]]
    refused: Callable[[Config], dict[str, Call]] | None = None

    def configured(self, real: Config | None = None) -> Config:
        """`config`; or `real`, a file's configuration, with this one's sizes."""
        if real is None:
            return dict(self.config)
        return {**real, **{name: self.config[name] for name in self.small}}


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, other ones for each shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(97 * seed + 31 * len(shape) + sum(shape)))


def times(*values: float) -> Tensor:
    return torch.tensor(values)


def padded(batch: int, num: int) -> Tensor:
    """A mask of a text of `num` tokens for each row, of which the last row has fewer."""
    mask = torch.ones(batch, num, dtype=torch.long)
    mask[-1, num // 2 :] = 0
    return mask


def exists(kind: str) -> bool:
    """Whether this ComfyUI has the configuration class."""
    import comfy.supported_models

    return hasattr(comfy.supported_models, kind)


def build(kind: str, config: Config) -> nn.Module:
    """ComfyUI's transformer of a configuration, in fp32 on the CPU, with weights that all count."""
    import comfy.supported_models

    made = getattr(comfy.supported_models, kind)(copy.deepcopy(config))
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({}, "", device=torch.device("cpu")).diffusion_model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            if weight.is_floating_point():
                size = 0.8 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    return model.eval().requires_grad_(False)
