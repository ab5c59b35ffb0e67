"""One call of ComfyUI's transformer as a tree that a message can carry."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from comfy_xdit_nodes.refuse import refuse_options
from torch import Tensor

from comfy_xdit.messages import Tuple


def as_call(x: Any, timestep: Any, *, own: Collection[str] = (), **named: Any) -> dict[str, Any]:
    """What `Denoise.calls` holds for the arguments that ComfyUI's model passes to its transformer.

    own: the transformer_options that the transformer reads; others that change nothing stay here.
    Raises ValueError, naming it, for an argument or an option that can't travel.
    """
    options = named.pop("transformer_options", None) or {}
    refuse_options(options, own)
    kept = {name: options[name] for name in own if name in options}
    given = {"x": x, "timestep": timestep, **named, "transformer_options": kept}
    return {name: _tree(name, value) for name, value in given.items() if value is not None}


def _tree(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, tuple):
        return Tuple(items=[_tree(name, item) for item in value])
    if isinstance(value, list):
        return [_tree(name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _tree(f"{name}.{key}", item) for key, item in value.items()}
    raise ValueError(f"the pool can't take the model's argument {name!r}, a {type(value).__name__}; remove its node")
