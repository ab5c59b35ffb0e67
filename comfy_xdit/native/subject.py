"""A tiny model of a family's real class, and calls that use each argument that the family names."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError

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


def cases(subjects: Iterable[Subject], real: dict[str, Config] | None = None) -> list[tuple[Subject, Config]]:
    """Each subject and the tiny configuration that it is made with.

    real: kind → the configuration of a file that is to be run; the other kinds are then left out.

    Subjects of a kind may differ in nothing but what is the file's then; those are one.
    """
    found: list[tuple[Subject, Config]] = []
    for subject in subjects:
        if real is None or subject.kind in real:
            config = subject.configured((real or {}).get(subject.kind))
            if all((subject.kind, config) != (other.kind, same) for other, same in found):
                found.append((subject, config))
    return found


def as_text(config: Config) -> str:
    """A file's configuration as Python writes it, without its dtype; `from_text` reads it.

    Raises InputError, naming the entry, for what no text says whole.
    """
    kept = {name: value for name, value in sorted(config.items()) if name != "dtype"}
    for name, value in kept.items():
        try:
            is_same = bool(ast.literal_eval(repr(value)) == value)
        except (ValueError, SyntaxError):
            is_same = False
        if not is_same:
            raise InputError(f"the configuration's {name!r} is a {type(value).__name__}; no self-test can be told it")
    return repr(kept)


def from_text(text: str) -> Config:
    """Raises InputError for a text that is no dict of plain values."""
    try:
        config = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        config = None
    if not isinstance(config, dict):
        raise InputError("the configuration is no dict of plain values, as Python writes it")
    return config


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
