"""A hash of all that a VAE of ComfyUI's own class is, but its weights: what two processes built is compared by it."""

from __future__ import annotations

import hashlib
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

OF_A_PROCESS = frozenset(("device", "output_device", "patcher", "size", "disable_offload", "first_stage_model"))
"""Attributes of ComfyUI's VAE object that say where it is, and nothing of what it computes."""

OF_A_RUN = re.compile(
    r"_.*|training|.*comfy_.*|.*_function|.*cache.*|device|seed_key|skip_injection"
    r"|current_patcher|current_weight_patches_uuid|currently_used|dynamic_(patchers|pins|vbars)"
    r"|lowvram_patch_counter|model_(loaded_weight_memory|lowvram|offload_buffer_memory)"
)
"""Attributes of its layers that ComfyUI's memory management sets, or a run leaves behind."""


def vae_hash(vae: Any) -> str:
    """Of a `comfy.sd.VAE`: its attributes, functions included, and its layers with their settings and shapes.

    Two VAEs of one ComfyUI with the same hash and the same weights give the same pictures.
    """
    seen = hashlib.blake2b(digest_size=16)
    for line in _lines(vae):
        seen.update(line.encode() + b"\n")
    return seen.hexdigest()


def _lines(vae: Any) -> Iterator[str]:
    for name in sorted(vars(vae).keys() - OF_A_PROCESS):
        yield f"{name}={_written(vars(vae)[name])}"
    model: nn.Module = vae.first_stage_model
    for path, layer in model.named_modules():
        own = {name: value for name, value in vars(layer).items() if not OF_A_RUN.fullmatch(name)}
        yield f"{path}: {_name(type(layer))} {_written(own)}"
    # Not their dtypes: some hosts keep weights as the file has them, and cast them at each use.
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, tensor in tensors:
            yield f"{kind} {path} {list(tensor.shape)}"


def _written(value: Any) -> str:
    """The value as text that another process would write alike; of what is no plain value only its type."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{key}: {_written(item)}' for key, item in value.items()))}}}"
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.MethodType):
        return _name(value.__func__)
    return _name(value if isinstance(value, type) else type(value))


def _function(function: types.FunctionType) -> str:
    """Its place in the sources, which are the same, and the values that it was made with."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            # Functions in it are called by name only: two may hold each other.
            held = cell.cell_contents
            cells.append(_name(held) if callable(held) else _written(held))
        except ValueError:
            cells.append("nothing yet")
    return f"{_name(function)} line {function.__code__.co_firstlineno} of {_written(cells)}"


def _name(value: Any) -> str:
    module = getattr(value, "__module__", "")
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"
