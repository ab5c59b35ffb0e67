"""LoRA and the like, from ComfyUI's MODEL to messages."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from comfy_xdit_nodes.absent import AbsentWeight
from comfy_xdit_nodes.named import name_of

from comfy_xdit.messages import Patch

KINDS = ("lora", "loha", "lokr", "glora", "oft", "boft")
MODEL = "diffusion_model."


def file_key(key: str) -> str:
    """A weight's name in the checkpoint: newer versions of ComfyUI rename Flux's norm scales."""
    key = key.removeprefix(MODEL)
    for norm in ("query_norm", "key_norm"):
        if key.endswith(f".{norm}.weight"):
            return key.removesuffix("weight") + "scale"
    return key


def own_key(key: str) -> str:
    """A weight's name in the transformer. Raises ValueError for what is beside it."""
    if not key.startswith(MODEL):
        raise ValueError(f"the pool can't apply a patch to {key}, which is no weight of the transformer")
    return key.removeprefix(MODEL)


def encode_patches(
    patches: dict[str, list[tuple[Any, ...]]], spelled: Callable[[str], str] = file_key
) -> list[Patch]:
    """ComfyUI's patches as messages, key after key, each key's in their order.

    patches: weight → [(strength, value, strength_model, offset, function)].
    spelled: what the workers call a weight: `own_key` for a model of ComfyUI's own class.
    Raises ValueError, naming the weight, for what a worker can't do.
    """
    return [_encode(key, spelled(key), *entry) for key, entries in patches.items() for entry in entries]


def param_bytes(model: torch.nn.Module, patched: Container[str], storage: torch.dtype, compute: torch.dtype) -> float:
    """What one parameter takes on the workers, on average.

    patched: names of weights with patches: on a model that is kept in fp8 the workers keep these as they compute in.
    """
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    touched = sum(size for name, size in sizes.items() if name in patched) if storage.itemsize == 1 else 0
    total = sum(sizes.values())
    return storage.itemsize + (compute.itemsize - storage.itemsize) * touched / total


def _encode(
    key: str,
    spelled: str,
    strength: float,
    value: Any,
    strength_model: float,
    offset: Any = None,
    function: Any = None,
) -> Patch:
    kind, weights = _value(key, value)
    return Patch(
        key=spelled,
        kind=kind,
        weights=weights,
        strength=float(strength),
        strength_model=float(strength_model),
        offset=None if offset is None else [int(number) for number in offset],
        function=_function(key, function),
    )


def _value(key: str, value: Any) -> tuple[str, list[Any]]:
    """Kind and weights of one patch: an adapter, an old tuple, or a merged model's weight."""
    if isinstance(value, WeightAdapterBase):
        if value.name not in KINDS:
            raise ValueError(f"the pool can't apply {value.name!r} to {key}; it knows {', '.join(KINDS)}")
        return value.name, _weights(key, value.name, value.weights)
    if isinstance(value, list):
        return "diff", [_merged(key, value)]
    if isinstance(value, tuple) and len(value) == 1:
        return "diff", _weights(key, "diff", value)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in (*KINDS, "diff", "set"):
        return value[0], _weights(key, value[0], value[1])
    named = value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else name_of(value)
    raise ValueError(f"the pool can't apply a patch of kind {named!r} to {key}; remove its node")


def _weights(key: str, kind: str, weights: Any) -> list[Any]:
    reshapes = kind == "diff" and len(weights) > 1 and weights[1] and weights[1].get("pad_weight")
    if reshapes or (kind == "lora" and len(weights) > 5 and weights[5] is not None):
        raise ValueError(
            f"the pool can't apply a LoRA that enlarges {key} (a Flux control LoRA); use the stock sampler for it"
        )
    if kind in ("diff", "set"):
        return [weights[0]]
    return [weight if weight is None or torch.is_tensor(weight) else float(weight) for weight in weights]


def _merged(key: str, value: list[Any]) -> torch.Tensor:
    """The other model's weight, with its own patches, of a merge: [(weight, convert), patch, ...]."""
    weight, convert = value[0]
    if isinstance(weight, AbsentWeight):
        raise ValueError(
            f"the weights of the merged model are on a pool (first: {key}); merge in front of Parallel Model (xDiT)"
        )
    weight = convert(weight.to(torch.float32, copy=True), inplace=True)
    return comfy.lora.calculate_weight(value[1:], weight, key)


def _function(key: str, function: Any) -> str | None:
    if function is None:
        return None
    if function is comfy.utils.swap_scale_shift:
        return "swap_scale_shift"
    raise ValueError(f"the pool can't apply the weight function {name_of(function)} to {key}")
