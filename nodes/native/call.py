"""One call of ComfyUI's transformer as a tree that a message can carry."""

from __future__ import annotations

from typing import Any

from comfy_xdit_nodes.refuse import HARMLESS, refuse_options
from torch import Tensor

from comfy_xdit.messages import Tuple

READ_BY_MODELS = ("cond_or_uncond", "sigmas", "sample_sigmas")
"""Notes of ComfyUI's loop that a transformer may read: they travel, the other harmless ones stay."""


def as_call(x: Any, timestep: Any, **named: Any) -> dict[str, Any]:
    """What `Denoise.calls` holds for the arguments that ComfyUI's model passes to its transformer.

    Raises ValueError, naming it, for an argument or an option that can't travel.
    """
    options = named.pop("transformer_options", None) or {}
    refuse_options(options)
    kept = {name: value for name, value in options.items() if name in READ_BY_MODELS or name not in HARMLESS}
    # Empty: what patches_replace and the like leave behind when nothing is in them.
    kept = {name: value for name, value in kept.items() if not (isinstance(value, dict) and not value)}
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
