"""A MODEL of ComfyUI's own class from a file's header: this process reads none of its large weights."""

from __future__ import annotations

import os
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_xdit_nodes.native.checkpoint import ComfyCheckpoint, family_here
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.same_weights import stand_ins
from comfy_xdit_nodes.native.source import load_message, source_of
from safetensors import SafetensorError
from torch import Tensor, nn

from comfy_xdit.native.family import PLAIN
from comfy_xdit.native.load import detected, read
from comfy_xdit.native.network import network_of
from comfy_xdit.weights.stamp import stamp

META = torch.device("meta")


def open_header(path: str, *, dtype: torch.dtype | None, fp8: bool) -> tuple[Any, ComfyCheckpoint] | None:
    """ComfyUI's configuration of the model in a safetensors file, and how the workers load it.

    dtype: what to keep the weights in; None chooses as the stock loader does. fp8: multiply fp8 matrices as such.
    None where diffusers' class is to run it, as in an older ComfyUI, where there is no plan for it, and for what is no
    whole safetensors file.
    """
    if use_comfy() is None:
        return None
    path = os.path.abspath(path)
    # First: who writes to the file while it is looked at gives it another stamp.
    found = stamp(path)
    try:
        views, metadata = read(path)
    except (OSError, SafetensorError):
        return None
    # In inference mode tensors don't count the writes to them.
    with torch.inference_mode(False), torch.no_grad():
        config, weights = detected(dict(stand_ins(views)), metadata)
        if config is None:
            return None
        is_quantised = config.quant_config is not None
        family = family_here(type(config).__name__, is_quantised)
        if family is None:
            return None
        _choose(config, weights, dtype, fp8)
        net = config.get_model(dict(weights), "", device=META).diffusion_model
    shape, meta = family.shape(net, is_quantised=is_quantised), _weights(net)
    kept = sum(_kept_as(key, one, meta, is_quantised).nbytes for key, one in weights.items())
    channels = config.latent_format.latent_channels
    return config, ComfyCheckpoint(
        message=load_message(path, source_of(config), found),
        family=family,
        shape=shape,
        network=network_of(family, net, shape, latent_channels=channels, kept_bytes=kept),
        config=config.unet_config,
        num_dims=config.latent_format.latent_dimensions + 2,
        is_quantised=is_quantised,
        meta=meta,
    )


def _kept_as(key: str, weight: Tensor, meta: dict[str, Tensor], is_quantised: bool) -> Tensor:
    """A quantised weight, and what belongs to it, stays as it is in the file; any other one gets the chosen dtype."""
    return weight if key not in meta or (is_quantised and weight.dtype not in PLAIN) else meta[key]


def _choose(config: Any, weights: dict[str, Tensor], dtype: torch.dtype | None, fp8: bool) -> None:
    """Say what the weights are kept in, and cast to, as ComfyUI's loader does for a file of such weights."""
    management, supported = comfy.model_management, list(config.supported_inference_dtypes)
    is_quantised = config.quant_config is not None
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(weights),
            supported_dtypes=supported,
            weight_dtype=None if is_quantised else comfy.utils.weight_dtype(weights),
        )
    device = management.get_torch_device()
    cast = management.unet_manual_cast(None if is_quantised else dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    if fp8:
        config.optimizations["fp8"] = True


def _weights(net: nn.Module) -> dict[str, Tensor]:
    """Name → tensor without numbers; also of the weights that layers which may be quantised make when they load."""
    found = dict([*net.named_parameters(), *net.named_buffers()])
    for path, layer in net.named_modules():
        if (shape := getattr(layer, "_orig_shape", None)) is not None and getattr(layer, "weight", None) is None:
            made_with: dict[str, Any] = layer.factory_kwargs  # type: ignore[assignment]
            found[f"{path}.weight"] = torch.empty(tuple(shape), dtype=made_with["dtype"], device=META)  # type: ignore[arg-type]
    return {key: torch.empty(one.shape, dtype=one.dtype, device=META) for key, one in found.items()}
