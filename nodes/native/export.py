"""A copy in shared memory of a MODEL whose file the workers can't load: in ComfyUI's own layout, quantised or not."""

from __future__ import annotations

from typing import Any

import torch
from comfy_xdit_nodes.export import ALIGNMENT, NAMES, export_file
from comfy_xdit_nodes.named import name_of
from comfy_xdit_nodes.native.same_weights import is_same, named_by_comfyui, pristine, unknown
from comfy_xdit_nodes.native.source import load_message, source_of
from comfy_xdit_nodes.source import format_of
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import ComfySource, LoadModel
from comfy_xdit.weights.stamp import stamp

WAY_OUT = "load it with Load Diffusion Model or Load Checkpoint"

QUANTISED = NAMES | {torch.uint8: "U8", torch.int8: "I8"}
"""What quantised weights, their scales and the notes on them are made of, as safetensors calls it."""


def export(patcher: Any, owner: Any) -> LoadModel:
    """What has a worker load the MODEL's unpatched weights from a copy, which is removed when `owner` is collected.

    Raises ValueError where there is no room for it, where layers are of another node's making, and where ComfyUI would
    find another model in it.
    """
    config = patcher.model.model_config
    if config.custom_operations is not None:
        raise ValueError(
            f"the workers can't load this MODEL: its layers come from {name_of(config.custom_operations)}; {WAY_OUT}"
        )
    source = source_of(config)
    state = pristine(patcher)
    for key in unknown(state):
        form = format_of(patcher.model.diffusion_model, key, state[key])
        raise ValueError(f"the workers can't load this MODEL: its {key} is in {form}; {WAY_OUT}")
    weights = {key: _as_bytes(weight) for key, weight in state.items()}
    weights = dict(sorted(weights.items(), key=lambda item: _order(item[1])))
    _require_found(weights, source)
    path = str(export_file(owner, weights, what="MODEL", way_out=f"{WAY_OUT}, which needs no copy", names=QUANTISED))
    return load_message(path, source, stamp(path))


def _order(weight: Tensor) -> tuple[bool, int]:
    """Sorts weights so that each begins where a view of its type may, and nearly all where memory of its own would.

    A matrix product on a CPU rounds otherwise at another alignment.
    """
    return weight.nbytes % ALIGNMENT != 0, -weight.element_size()


def _as_bytes(weight: Tensor) -> Tensor:
    """A weight of the type that is only for scales as the bytes that ComfyUI's files have for it."""
    return weight.view(torch.uint8) if weight.dtype == getattr(torch, "float8_e8m0fnu", None) else weight


def _require_found(weights: dict[str, Tensor], source: ComfySource) -> None:
    """Raises ValueError unless ComfyUI takes a file of these weights for the same model, with these weights."""
    try:
        found = named_by_comfyui(weights, None, source)
    except InputError:
        found = {}
    kept = {key for key, one in found.items() if key in weights and one[1] is not None}
    if not kept == weights.keys() == found.keys() or not all(is_same(key, found[key], weights[key]) for key in kept):
        raise ValueError(
            f"the workers can't load this MODEL: ComfyUI would not find it again in a copy of its weights; {WAY_OUT}"
        )
