"""Which patches go with a weight, by their shapes alone: known before anything is computed, and alike on every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Patch
from comfy_xdit.quoted import quoted

from .patches import CHANGES, apply_patches, check_words

VALUES = {
    "lora": ("up", "down", "alpha?", "mid?", "dora_scale?", "reshape?"),
    "loha": ("w1_a", "w1_b", "alpha?", "w2_a", "w2_b", "t1?", "t2?", "dora_scale?"),
    "lokr": ("w1?", "w2?", "alpha?", "w1_a?", "w1_b?", "w2_a?", "w2_b?", "t2?", "dora_scale?"),
    "glora": ("a1", "a2", "b1", "b2", "alpha?", "dora_scale?"),
    "oft": ("blocks", "rescale?", "alpha?", "dora_scale?"),
    "boft": ("blocks", "rescale?", "alpha?", "dora_scale?"),
    "diff": ("difference",),
    "set": ("value",),
}
"""What an adapter's values are, in order; those with a question mark may be None."""


def fitting(shape: Sequence[int], patches: list[Patch]) -> tuple[list[Patch], list[list[str]]]:
    """The patches that go with a weight of the shape, and [key, why] of each that is left out, as ComfyUI does.

    One odd layer of a LoRA doesn't spoil a job. What a patch that is left out does to the weight before, it still does:
    that is its strength_model. The patches are sound (`check_patch`).
    Raises InputError for rows or columns that the weight hasn't got.
    """
    # Without numbers: only shapes can be wrong here, not memory and not a device.
    weight = torch.empty(tuple(shape), device="meta")
    fit: list[Patch] = []
    misfits: list[list[str]] = []
    for patch in patches:
        _check_offset(patch, weight.shape)
        try:
            weight = apply_patches(weight, [patch])
        except (RuntimeError, IndexError) as error:
            misfits.append([patch.key, quoted(error)])
            if patch.strength_model != 1.0:
                fit.append(dataclasses.replace(patch, kind="diff", weights=[torch.zeros(1)], strength=0.0))
        else:
            fit.append(patch)
    return fit, misfits


def check_patch(patch: Patch) -> None:
    """Raises InputError for a kind or function that we don't know, and for values that are none of its kind."""
    check_words(patch)
    if not (math.isfinite(patch.strength) and math.isfinite(patch.strength_model)):
        raise InputError(f"a patch of {patch.key} has the strength {patch.strength}; use a number that is finite")
    names = VALUES[patch.kind]
    values = patch.weights[:1] if _pads(patch) else patch.weights
    if len(values) != len(names):
        raise InputError(f"a {patch.kind} patch of {patch.key} has {len(values)} values, not {len(names)}")
    for name, value in zip(names, values, strict=True):
        if not _is_sound(name.removesuffix("?"), value, optional=name.endswith("?")):
            what = f"the {patch.kind} patch of {patch.key} has {_show(value)} as its {name.removesuffix('?')}"
            raise InputError(f"{what}; the file is damaged, so remove its node")
    if patch.kind == "lokr":
        w1, w2, _, a1, b1, a2, b2, *_ = values
        if (w1 is None and None in (a1, b1)) or (w2 is None and None in (a2, b2)):
            raise InputError(f"the lokr patch of {patch.key} lacks a factor; the file is damaged, so remove its node")


def _pads(patch: Patch) -> bool:
    """Whether it is a difference with ComfyUI's flag beside it that the weight may be enlarged for it."""
    flags = patch.weights[1] if patch.kind == "diff" and len(patch.weights) == 2 else None
    return isinstance(flags, dict) and type(flags.get("pad_weight")) is bool


def _is_sound(name: str, value: Any, *, optional: bool) -> bool:
    if value is None:
        return optional
    if name == "alpha":
        return type(value) in (int, float) and math.isfinite(value)
    if name == "reshape":
        return isinstance(value, list) and all(type(size) is int and 0 < size < 2**31 for size in value)
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"numbers of the shape {list(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    return "nothing" if value is None else repr(value)[:40]


def _check_offset(patch: Patch, shape: Sequence[int]) -> None:
    if patch.offset is None:
        return
    if len(patch.offset) == 3:
        dim, start, length = patch.offset
        if 0 <= dim < len(shape) and start >= 0 and 0 < length <= shape[dim] - start:
            return
    raise InputError(
        f"a patch of {patch.key} is for the part {patch.offset} of a weight of {list(shape)}; "
        "give [dim, first, number] within it"
    )


assert VALUES.keys() == {*CHANGES, "diff", "set"}
