"""A trial of a flash-attn package, in a process of its own: with the arguments MODULE DEVICE DTYPE.

A build without a kernel for the device may raise, end the process or give wrong numbers. So before a worker uses one,
its output and its log-sum-exp are compared here with what torch computes. Standard library and torch only.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GOOD = "flash-attn is good"
"""The last line of output after a trial without a fault; else it is a sentence on the fault."""

LIMIT = 0.02
"""How far outputs, weighted means of numbers near 1, and LSEs may be off: half precision has 8 or 11 bits."""

HEAD_DIMS, TOKENS = (64, 128), (160, 96)
"""Of queries, and of keys and values."""


def attend(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and LSE from a flash-attn function; [batch, heads, tokens, head dim] and [batch, heads, tokens]."""
    # The first releases of flash-attn 3 return the LSE without being asked, later ones take the argument.
    known = inspect.signature(kernel).parameters
    wanted = {"return_attn_probs": True} if "return_attn_probs" in known else {}
    # Any strides will do but those within a head.
    parts = [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v)]
    out, lse = kernel(*parts, softmax_scale=scale, **wanted)[:2]
    return out.transpose(1, 2), lse


def fault_of(kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> str:
    """How the kernel differs from torch's numbers; "" for not at all."""
    for head_dim in HEAD_DIMS:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, 3, tokens, head_dim, generator=generator).to(device, dtype)
            for tokens in (TOKENS[0], TOKENS[1], TOKENS[1])
        )
        out, lse = attend(kernel, q, k, v, None)
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        want_lse = (q.float() @ k.float().transpose(-1, -2) * head_dim**-0.5).logsumexp(-1)
        for name, got, expected in (("output", out, want), ("log-sum-exp", lse, want_lse)):
            if got.shape != expected.shape:
                return f"its {name} is of shape {list(got.shape)}, not {list(expected.shape)}"
            off = float((got.float() - expected).abs().max())
            if not off <= LIMIT:
                return f"its {name} is {off:.2g} off at heads of {head_dim}"
    return ""


def main(module: str, device: str, dtype: str) -> None:
    try:
        kernel = importlib.import_module(module).flash_attn_func
        with torch.inference_mode():
            fault = fault_of(kernel, torch.device(device), getattr(torch, dtype))
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    sys.stdout.write(f"\n{fault or GOOD}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
