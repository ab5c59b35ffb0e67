"""A model of ComfyUI's own class, its weights views of the mapped file.

Nothing is chosen here: class, dtypes and configuration are the host's, and what ComfyUI finds in the file is compared
with them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.messages import ComfySource

log = logging.getLogger("comfy_xdit")

Mine = Callable[[str, Tensor], Tensor | None]
"""Name and whole weight → what this rank holds of it, a view where it can be, and None for nothing."""

Part = Callable[[nn.Module], Mine]
"""The transformer, whose weights are not read yet → what this rank holds; blocks of other stages are left out of it."""


def whole(net: nn.Module) -> Mine:
    return lambda key, weight: weight


def config_hash(config: Any) -> str:
    """Of everything that the class of a model is made with, dtype included."""
    text = json.dumps(config.unet_config, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load(path: str, told: ComfySource, device: torch.device, part: Part = whole) -> tuple[Any, range]:
    """ComfyUI's BaseModel of the file, ready to run, and the addresses at which the file is mapped.

    part: which of its weights are for this rank; no others are read.

    To be called, and the model to be run, under `torch.inference_mode`. Keys that the file lacks or has beside are
    logged, as ComfyUI does. Raises InputError when ComfyUI finds another model in the file than the host did.
    """
    weights, metadata = read(path)
    addresses = _span(list(weights.values()))
    config, weights = _configured(weights, metadata, told)
    # On the CPU, whatever the device: there memory that is never touched is never taken.
    model = config.get_model(weights, "", device=None)
    model.device = device
    net = model.diffusion_model
    weights = config.process_unet_state_dict(dict(weights))
    own, elsewhere = _own(net, weights, device, part(net))
    missing, unexpected = net.load_state_dict(own, strict=False, assign=True)
    for what, keys in (("missing", set(missing) - elsewhere), ("unexpected", set(unexpected))):
        if keys:
            log.warning("unet %s: %s", what, sorted(keys))
    net.requires_grad_(False)
    net.to(device)
    if _channels_last():
        net.to(memory_format=torch.channels_last)
    return model, addresses


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Key → view of the mapped file, in any dtype, and the notes in its header; no weight is read."""
    import safetensors

    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _span(views: list[Tensor]) -> range:
    """The addresses from the first view to the end of the last."""
    begins = [view.data_ptr() for view in views if view.nbytes]
    ends = [view.data_ptr() + view.nbytes for view in views if view.nbytes]
    return range(min(begins, default=0), max(ends, default=0))


def _configured(weights: dict[str, Tensor], metadata: Any, told: ComfySource) -> tuple[Any, dict[str, Tensor]]:
    """ComfyUI's configuration of the file with the host's choices, and the weights as it names them."""
    import comfy.model_detection as detection
    import comfy.utils

    weights, metadata = comfy.utils.convert_old_quants(weights, "", metadata=metadata)
    prefix = detection.unet_prefix_from_state_dict(weights)
    if of_model := comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True):
        weights, metadata = comfy.utils.convert_old_quants(of_model, "", metadata=metadata)
    config = detection.model_config_from_unet(weights, "", metadata=metadata)
    if config is None:
        weights = detection.convert_diffusers_mmdit(weights, "") or {}
        config = detection.model_config_from_unet(weights, "") if weights else None
    found = type(config).__name__ if config is not None else "no model"
    if found != told.kind:
        raise InputError(f"the workers' ComfyUI takes the file for {found}, this one for {told.kind}; restart the pool")
    config.set_inference_dtype(_dtype(told.dtype), _dtype(told.cast) if told.cast else None)
    config.optimizations["fp8"] = told.fp8
    if config_hash(config) != told.config:
        raise InputError(
            f"the workers' ComfyUI reads other sizes of {told.kind} from the file than this one; restart the pool"
        )
    return config, weights


def _own(
    net: nn.Module, weights: dict[str, Tensor], device: torch.device, mine: Mine
) -> tuple[dict[str, Tensor], set[str]]:
    """What to load here, in the module's dtypes, and the names of what other ranks hold.

    On a CPU a weight that has its dtype in the file stays a view of it.
    """
    dtypes = {key: value.dtype for key, value in (*net.named_parameters(), *net.named_buffers())}
    for layer in net.modules():
        # Layers that may be quantised put their weights where they were made.
        if made_with := cast("dict[str, Any]", getattr(layer, "factory_kwargs", None)):
            made_with["device"] = device
    own: dict[str, Tensor] = {}
    elsewhere: set[str] = set()
    for key, weight in weights.items():
        part = mine(key, weight)
        if part is None:
            elsewhere.add(key)
            continue
        if key.endswith(".comfy_quant"):
            own[key] = weight  # JSON in bytes, which ComfyUI reads on the CPU
            continue
        if part.shape != weight.shape and key in dtypes:
            _resize(net, key, part)
        own[key] = part.to(device=device, dtype=dtypes.get(key, part.dtype))
    return own, elsewhere


def _resize(net: nn.Module, key: str, part: Tensor) -> None:
    """Make room for a part: torch compares shapes also where it then assigns."""
    path, _, name = key.rpartition(".")
    empty = torch.empty(part.shape, dtype=part.dtype, device="meta")
    net.get_submodule(path)._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _channels_last() -> bool:
    import comfy.model_management

    return bool(comfy.model_management.force_channels_last())


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{name!r} is no dtype of torch {torch.__version__}; start the pool with ComfyUI's torch")
    return dtype
