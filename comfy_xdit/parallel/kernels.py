"""The one place that chooses an attention kernel: flash-attn 3 or 2 when installed and usable, torch else.

Tensors are [batch, heads, sequence, head dim]. The log-sum-exp (LSE), which ring attention needs, is
[batch, heads, query sequence], natural, in fp32 (fp64 for fp64), and -inf where a query sees no key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import flash
from .flash_try import attend

aten = torch.ops.aten

MATH_LIMIT_BYTES = 256 * 2**20
"""The plain kernel works on so many queries at a time that their scores stay below this."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v; rows that see no key are 0.

    mask: bool (True = seen) or additive, broadcastable to [batch, heads, query, key].
    """
    if q.numel() == 0 or k.shape[2] == 0:
        return q.new_zeros((*q.shape[:-1], v.shape[-1]))
    name = choose(q, masked=mask is not None, lse=False)
    if name in flash.MODULES:
        return _flash(name, q, k, v, scale)[0]
    if mask is not None and mask.dtype != torch.bool and q.dtype == torch.float64:
        # torch 2.13 takes an fp32 mask too, and on a CPU reads it as fp64.
        mask = mask.to(q.dtype)
    # Flash kernels of torch refuse masks; scaled_dot_product_attention then picks another by itself.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if mask is None else out.masked_fill(unseen(mask), 0)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` and its LSE."""
    if q.numel() == 0 or k.shape[2] == 0:
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)
        return q.new_zeros((*q.shape[:-1], v.shape[-1])), lse
    out, lse = _LSE_KERNELS[choose(q, masked=mask is not None, lse=True)](q, k, v, mask, scale)
    if mask is None:
        return out, lse
    # Kernels report 0 for a row that sees nothing, which a merge would take for real weight.
    dead = unseen(mask)
    return out.masked_fill(dead, 0), lse.masked_fill(dead.squeeze(-1), -torch.inf)


def unseen(mask: Tensor) -> Tensor:
    """Whether a query sees no key at all: [batch or 1, heads or 1, query or 1, 1]."""
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return ~seen.any(-1, keepdim=True)


def choose(q: Tensor, *, masked: bool, lse: bool) -> str:
    """The kernel's name for queries like `q`; "sdpa" only when the LSE isn't wanted."""
    head_dim = q.shape[-1]
    if q.device.type == "cpu":
        return "cpu" if lse else "sdpa"
    if q.device.type != "cuda":
        return "math" if lse else "sdpa"
    half = q.dtype in (torch.float16, torch.bfloat16)
    even = head_dim % 8 == 0 and head_dim <= 256
    major = torch.cuda.get_device_capability(q.device)[0]
    if half and even and not masked:
        for name, usable in (("flash-attn 3", major == 9), ("flash-attn 2", major >= 8)):
            if usable and flash.usable(name, q.device, q.dtype) is not None:
                return name
    if not lse:
        return "sdpa"
    if half and even and not masked and major >= 8:
        return "flash"
    if even and (q.dtype in (torch.float32, torch.float16) or (q.dtype == torch.bfloat16 and major >= 8)):
        return "efficient"
    return "math"


def prepare(device: torch.device) -> None:
    """Try what `choose` may take on `device`: a trial takes seconds and memory, which a model may not leave it."""
    if device.type == "cuda" and any(map(flash.is_installed, flash.MODULES)):
        for dtype in (torch.float16, torch.bfloat16):
            choose(torch.empty(1, 1, 1, 64, dtype=dtype, device=device), masked=False, lse=True)


def _flash(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    kernel = flash.usable(name, q.device, q.dtype)
    assert kernel is not None
    return attend(kernel, q, k, v, scale)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    if q.shape[-1] != v.shape[-1]:
        return _math(q, k, v, mask, scale)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=None if mask is None else _additive(mask, q, k), scale=scale
    )


def _torch_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    assert mask is None
    out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    bias = None
    if mask is not None:
        # Its loads are aligned: rows of the bias must begin at multiples of 16 elements.
        bias = F.pad(_additive(mask, q, k), (0, -k.shape[2] % 16))[..., : k.shape[2]]
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]  # it pads the queries to a multiple of 32


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return mask.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention in fp32 (fp64 for fp64), some queries at a time."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_t, v_wide = k.to(dtype).transpose(-1, -2), v.to(dtype)
    row_bytes = q.shape[0] * q.shape[1] * k.shape[2] * dtype.itemsize
    step = max(MATH_LIMIT_BYTES // max(row_bytes, 1), 1)
    outs, lses = [], []
    for begin in range(0, q.shape[2], step):
        scores = q[:, :, begin : begin + step].to(dtype) @ k_t * scale
        if mask is not None:
            rows = mask if mask.shape[-2] == 1 else mask[..., begin : begin + step, :]
            scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows
        lse = scores.logsumexp(-1)
        # A row that sees nothing has LSE -inf, and -inf minus -inf is not a number.
        outs.append((scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ v_wide)
        lses.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


_LSE_KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "flash-attn 3": lambda q, k, v, mask, scale: _flash("flash-attn 3", q, k, v, scale),
    "flash-attn 2": lambda q, k, v, mask, scale: _flash("flash-attn 2", q, k, v, scale),
    "flash": _torch_flash,
    "efficient": _efficient,
    "cpu": _cpu,
    "math": _math,
}
