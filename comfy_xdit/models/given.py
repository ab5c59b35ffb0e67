"""What a call of any family must hold, looked at before a rank computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError

DIMS = {"x": (4,), "timestep": (1,), "context": (3,), "y": (2,), "guidance": (1,), "c_size": (2,), "c_ar": (2,)}
"""How many dims each tensor has; all have one row for each of the batch, or one for all."""

REQUIRED = ("x", "timestep", "context")

COMPUTED = ("x", "context", "y", "ref_latents")
"""What goes into the model's matrices as it is, so it has the dtype that the model computes in."""

WORDS = {"x": "the latent (x)", "timestep": "the timestep", "context": "the text (context)", "y": "the pooled text (y)"}


def check_call(title: str, call: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raises InputError, in one sentence, where something is missing, is no tensor, or has another shape or dtype.

    title: of the family. dtype: what the model computes in. Sizes are the family's own matter.
    """
    for name, num_dims in DIMS.items():
        value = call.get(name)
        if value is not None:
            _check(title, WORDS.get(name, name), value, num_dims, dtype if name in COMPUTED else None)
        elif name in REQUIRED:
            raise InputError(f"{title} got a call without {WORDS[name]}; connect what gives it")
    references = call.get("ref_latents")
    if references is None:
        references = []
    if not isinstance(references, (list, tuple)):
        raise InputError(f"the reference latents for {title} are {_name(references)}; give a list of latents")
    for reference in references:
        _check(title, "a reference latent", reference, (4,), dtype)
    mask = call.get("attention_mask")
    if mask is not None:
        _check(title, "the attention mask", mask, (2, 3), torch.bool if _is_bool(mask) else None)
        # Of queries and keys, so it has no rows of the batch that could be dealt: a rank would get some of its queries.
        if mask.dim() == 2 and mask.shape[0] != 1:
            raise InputError(
                f"the attention mask for {title} has the shape {list(mask.shape)}; give [1, keys], or "
                "[batch, queries, keys]"
            )
    _check_rows(title, call)


def _check(title: str, what: str, value: Any, num_dims: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """dtype: None is any floating-point one."""
    if not isinstance(value, Tensor):
        raise InputError(f"{what} for {title} is {_name(value)}; give a tensor")
    if value.dim() not in num_dims or value.numel() == 0:
        wanted = " or ".join(map(str, num_dims))
        raise InputError(f"{what} for {title} has the shape {list(value.shape)}; give {wanted} dims, none empty")
    if dtype is None and not value.is_floating_point():
        raise InputError(f"{what} for {title} is made of {_name(value.dtype)}; give floating-point numbers")
    if dtype is not None and value.dtype != dtype:
        raise InputError(
            f"{what} for {title} is made of {_name(value.dtype)}, but the model computes in {_name(dtype)}"
        )


def _check_rows(title: str, call: Mapping[str, Any]) -> None:
    batch = call["x"].shape[0]
    for name in DIMS:
        value = call.get(name)
        if value is not None and value.shape[0] not in (1, batch):
            what = f"{WORDS.get(name, name)} for {title}"
            raise InputError(f"{what} has {value.shape[0]} rows for a batch of {batch}; use 1 or {batch}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _name(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"a {type(value).__name__}"
