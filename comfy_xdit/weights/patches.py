"""LoRA and its kin, applied to a weight in ComfyUI's layout, with ComfyUI's numbers.

Everything is computed in the weight's own dtype (fp32) on its device. Sources of the formulas: LoRA
arXiv 2106.09685, LoHa and LoKr (LyCORIS) 2309.14859, DoRA 2402.09353, OFT 2306.07280, BOFT 2311.06243,
GLoRA 2306.07967; the order of each adapter's values, and which factors apply when, are ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Patch

UNSETTLED = "being changed"
"""The patches_id of a model that wears neither the old nor the new patches: no host asks for it."""

Values = Sequence[Any]
"""An adapter's tuple: tensors (already on the weight's device, in its dtype), numbers and None."""


def apply_patches(weight: Tensor, patches: list[Patch]) -> Tensor:
    """The weight with the patches on it, in their order.

    weight: fp32, contiguous; it is overwritten. The result is the same tensor unless a patch enlarges it.
    The patches fit (`fit.fitting`): RuntimeError or IndexError for one that doesn't, but also for memory and devices.
    Raises InputError for unknown kinds and functions.
    """
    for patch in patches:
        part = weight if patch.offset is None else weight.narrow(*patch.offset)
        if patch.strength_model != 1.0:
            part.mul_(patch.strength_model)
        result = _apply(part, patch)
        if patch.offset is None:
            weight = result
    return weight


def check_words(patch: Patch) -> None:
    """Raises InputError for a kind or function that we don't know."""
    if patch.kind not in (*CHANGES, "diff", "set"):
        known = ", ".join([*CHANGES, "diff", "set"])
        raise InputError(f"unknown kind of patch {patch.kind!r} for {patch.key}; known are {known}")
    _reorder(patch)


def _apply(weight: Tensor, patch: Patch) -> Tensor:
    """`weight` after one patch: changed in place unless it grows."""
    reorder = _reorder(patch)
    values = [
        value.to(device=weight.device, dtype=weight.dtype) if isinstance(value, Tensor) else value
        for value in patch.weights
    ]
    if patch.kind == "set":
        return weight.copy_(values[0])
    if patch.kind == "diff":
        return _add_difference(weight, values, patch.strength, reorder)
    check_words(patch)
    if patch.kind == "lora":
        if values[5] is not None:
            weight = _padded(weight, [int(size) for size in values[5]])
        if _add_low_rank(weight, values, patch):
            return weight
    change, alpha, dora_scale = CHANGES[patch.kind](weight, values, patch.strength)
    change = change.reshape(weight.shape)
    if dora_scale is not None:
        return _decompose(weight, reorder(change.mul_(alpha)), dora_scale, patch.strength)
    # In OFT and BOFT alpha bounds the rotation and is no factor.
    factor = patch.strength if patch.kind in ("oft", "boft") else patch.strength * alpha
    return weight.add_(reorder(change.mul_(factor)))


def _add_low_rank(weight: Tensor, values: Values, patch: Patch) -> bool:
    """Add a plain LoRA in one pass, with no other tensor of the weight's size; False when it isn't plain."""
    up, down, alpha, mid, dora_scale, _ = values
    if mid is not None or dora_scale is not None or patch.function is not None or weight.dim() != 2:
        return False
    if up.dim() != 2 or down.dim() != 2 or (up.shape[0], down.shape[1]) != tuple(weight.shape):
        return False
    weight.addmm_(up, down, alpha=patch.strength * _per_rank(alpha, down.shape[0]))
    return True


def _per_rank(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


Change = tuple[Tensor, float, "Tensor | None"]
"""A new tensor with as many numbers as the weight, the factor it takes, and DoRA's magnitudes."""


def _lora(weight: Tensor, values: Values, strength: float) -> Change:
    up, down, alpha, mid, dora_scale, _ = values
    scale = _per_rank(alpha, down.shape[0])
    if mid is not None:
        down = torch.einsum("s r ..., r i -> s i ...", mid, down.flatten(1))
    return up.flatten(1) @ down.flatten(1), scale, dora_scale


def _loha(weight: Tensor, values: Values, strength: float) -> Change:
    a1, b1, alpha, a2, b2, t1, t2, dora_scale = values
    change = _product(a1, b1, t1).mul_(_product(a2, b2, t2))
    return change, _per_rank(alpha, b1.shape[0]), dora_scale


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b; with a Tucker core of shape [a's rank, b's rank, height, width], a is [rank, rows] instead."""
    if core is None:
        return a @ b
    return torch.einsum("i j k l, j r, i p -> p r k l", core, b, a)


def _lokr(weight: Tensor, values: Values, strength: float) -> Change:
    w1, w2, alpha, a1, b1, a2, b2, core, dora_scale = values
    rank = None
    if w1 is None:
        rank, w1 = b1.shape[0], a1 @ b1
    if w2 is None:
        rank, w2 = b2.shape[0], _product(a2, b2, core)
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    # kron refuses the strides of a Tucker product.
    return torch.kron(w1, w2.contiguous()), 1.0 if rank is None else _per_rank(alpha, rank), dora_scale


def _glora(weight: Tensor, values: Values, strength: float) -> Change:
    """W·A + B. Two generations of files have the factors the other way round; where both readings fit a
    square weight, because the rank equals the width, the older one holds."""
    a1, a2, b1, b2, alpha, dora_scale = values
    is_old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    is_new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if is_new and not (is_old and a2.shape[0] == weight.shape[0] == weight.shape[1]):
        is_old = False
    if not is_old and not is_new:
        raise RuntimeError("the four factors of a GLoRA have no rank in common")
    rank = a1.shape[0] if is_old else a2.shape[0]
    a1, a2, b1, b2 = (value.flatten(1) for value in (a1, a2, b1, b2))
    if is_old:
        change = (b2 @ b1).add_(weight.flatten(1) @ a2 @ a1)
    else:
        change = torch.einsum("o i ..., i j -> o j ...", torch.einsum("o i ..., i j -> o j ...", weight, a1), a2)
        change = change.reshape(weight.shape).add_((b1 @ b2).reshape(weight.shape))
    return change, _per_rank(alpha, rank), dora_scale


def _oft(weight: Tensor, values: Values, strength: float) -> Change:
    """Blocks of rows rotated. Strength is in here once, and once more in the sum: that is ComfyUI's curve."""
    blocks, _, alpha, dora_scale = values
    bound = alpha or 0.0
    rotation = _rotation(blocks, bound)
    identity = torch.eye(blocks.shape[-1], device=weight.device, dtype=weight.dtype)
    rows = weight.unflatten(0, tuple(blocks.shape[:2]))
    change = torch.einsum("k n m, k n ... -> k m ...", (rotation - identity).mul_(strength), rows)
    return change.flatten(0, 1), bound, dora_scale


def _boft(weight: Tensor, values: Values, strength: float) -> Change:
    """A butterfly: in level i, rows that are 2^i half blocks apart are rotated together."""
    blocks, rescale, alpha, dora_scale = values
    if alpha is None:
        raise RuntimeError("it has no alpha")
    rotations = _rotation(blocks, alpha)
    size = blocks.shape[-1]
    identity = torch.eye(size, device=weight.device, dtype=weight.dtype)
    rows = weight
    for level, rotation in enumerate(rotations):
        stride = 2**level * (size // 2)
        if strength != 1.0:
            rotation = rotation * strength + (1 - strength) * identity
        rows = rows.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        rows = torch.einsum("b i j, b j ... -> b i ...", rotation, rows)
        rows = rows.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    if rescale is not None:
        rows = rows * rescale
    return rows - weight, alpha, dora_scale


def _rotation(blocks: Tensor, bound: float) -> Tensor:
    """Cayley's transform of the skew part of [..., n, n] blocks, whose norm a positive `bound` limits."""
    skew = blocks - blocks.transpose(-1, -2)
    if bound > 0:
        norm = torch.linalg.vector_norm(skew) + 1e-8
        # No look at the numbers: a device would have to be waited for.
        skew = torch.where(norm > bound, skew * bound / norm, skew)
    identity = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)
    return (identity + skew) @ (identity - skew).inverse()


CHANGES: dict[str, Callable[[Tensor, Values, float], Change]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
}


def _decompose(weight: Tensor, change: Tensor, dora_scale: Tensor, strength: float) -> Tensor:
    """DoRA: the changed weight, rescaled to learned magnitudes: one for each row, or one for each column.

    Per row the norms are those of the unchanged weight, per column of the changed one, as in ComfyUI.
    """
    changed = weight + change
    if dora_scale.shape[0] == weight.shape[0]:
        norm = torch.linalg.vector_norm(weight.flatten(1), dim=1).view(-1, *[1] * (weight.dim() - 1))
    else:
        others = [dim for dim in range(weight.dim()) if dim != 1]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    changed.mul_(dora_scale / (norm + torch.finfo(weight.dtype).eps))
    if strength == 1.0:
        return weight.copy_(changed)
    return weight.add_(changed.sub_(weight), alpha=strength)


def _add_difference(weight: Tensor, values: Values, strength: float, reorder: Callable) -> Tensor:
    """`diff`: a tensor of the weight's shape; of a larger one when its flag "pad_weight" says so."""
    difference = values[0]
    if len(values) > 1 and values[1]["pad_weight"] and difference.shape != weight.shape:
        weight = _padded(weight, list(difference.shape))
    if strength == 0.0:
        return weight
    if difference.shape != weight.shape:
        raise RuntimeError(f"its shape is {tuple(difference.shape)}, the weight's {tuple(weight.shape)}")
    return weight.add_(reorder(strength * difference))


def _padded(weight: Tensor, shape: list[int]) -> Tensor:
    """The weight in the first corner of a larger one of zeros."""
    if len(shape) != weight.dim() or any(new < old for new, old in zip(shape, weight.shape, strict=True)):
        raise InputError(f"a patch wants a weight of {tuple(weight.shape)} padded to {tuple(shape)}")
    larger = weight.new_zeros(shape)
    larger[tuple(slice(size) for size in weight.shape)] = weight
    return larger


def _reorder(patch: Patch) -> Callable[[Tensor], Tensor]:
    if patch.function is None:
        return lambda change: change
    if patch.function == "swap_scale_shift":
        return lambda change: torch.cat(change.chunk(2)[::-1])
    raise InputError(f"unknown function {patch.function!r} of a patch for {patch.key}")
