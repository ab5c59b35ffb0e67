"""Patches of a part of a weight: what a plain LoRA or difference means to some rows and columns alone."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from comfy_xdit.messages import Patch
from comfy_xdit.parallel.tensor import Region


def divisible(patch: Patch, shape: tuple[int, ...]) -> bool:
    """Whether each part of the patched weight follows from that part of the weight and of the patch alone.

    shape: the weight's, in ComfyUI's layout. False also for patches that don't fit.
    """
    begin, rows = _rows(patch, shape)
    if patch.function is not None or begin < 0 or begin + rows > shape[0]:
        return False
    if patch.offset is not None and patch.offset[0] != 0:
        return False
    if patch.kind in ("diff", "set"):
        return len(patch.weights) == 1 and tuple(patch.weights[0].shape) == (rows, *shape[1:])
    if patch.kind != "lora" or len(shape) != 2:
        return False
    up, down, _, *special = patch.weights
    if any(value is not None for value in special) or up.dim() != 2 or down.dim() != 2:
        return False
    return (up.shape[0], down.shape[1]) == (rows, shape[1]) and up.shape[1] == down.shape[0]


def part_of(patch: Patch, shape: tuple[int, ...], region: Region) -> Patch | None:
    """A divisible patch, for a region of the weight only; None where it doesn't touch it."""
    begin, rows = _rows(patch, shape)
    first, end = max(begin, region.row), min(begin + rows, region.row + region.rows)
    if first >= end:
        return None

    def own_rows(value: Tensor) -> Tensor:
        return value.narrow(0, first - begin, end - first)

    up, *others = patch.weights
    if patch.kind == "lora":
        weights = [own_rows(up), region.columns_of(others[0]), *others[1:]]
    else:
        weights = [region.columns_of(own_rows(up))]
    offset = None if patch.offset is None else [0, first - region.row, end - first]
    return dataclasses.replace(patch, weights=weights, offset=offset)


def _rows(patch: Patch, shape: tuple[int, ...]) -> tuple[int, int]:
    """First row and number of rows that the patch is for."""
    if patch.offset is None:
        return 0, shape[0] if shape else 0
    return patch.offset[1], patch.offset[2]
