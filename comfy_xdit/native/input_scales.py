"""Layers that scale their inputs by all of them: what a rank with a part of the tokens computes otherwise."""

from __future__ import annotations

from torch import nn

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.spec import ParallelSpec

BY_ALL = ("nvfp4",)
"""Formats of ComfyUI's whose inputs, where a layer has no scale for them, get one of the tensor's largest number."""


def scaled_by_all(net: nn.Module) -> list[str]:
    """Names of the layers that quantise their inputs by the largest of all numbers.

    None where ComfyUI computes with plain numbers, as on a device that can't multiply in the format.
    """
    return [
        name
        for name, layer in net.named_modules()
        if getattr(layer, "quant_format", None) in BY_ALL
        and not getattr(layer, "_full_precision_mm", False)
        and getattr(layer, "input_scale", None) is None
    ]


def require_whole_inputs(title: str, layers: list[str], spec: ParallelSpec) -> None:
    """Raises InputError where a rank of `spec` would see a part of the tokens only. layers: of `scaled_by_all`."""
    if layers and spec.ulysses * spec.ring * spec.distri > 1:
        raise InputError(
            f"{title} has {len(layers)} layers in nvfp4 that scale their inputs by the largest number of all tokens, "
            f"which no rank sees under {spec}; use cfg, dp or pipe, or a file in another format"
        )
