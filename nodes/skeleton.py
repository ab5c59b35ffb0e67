"""ComfyUI's own model without its weights.

ComfyUI's loop asks a model for its latent format, its sigmas, its conditioning, the names of its weights, and where and
of which type they are, and gets all of that from here. Only the diffusion transformer's `_forward` is replaced, on the
instance, so that wrappers that other nodes put around the transformer still run; and what ComfyUI has the transformer
do to a text before sampling.
"""

from __future__ import annotations

from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from comfy_xdit_nodes.absent import without_numbers
from comfy_xdit_nodes.checkpoint import Checkpoint
from comfy_xdit_nodes.remote import RemoteModel
from torch import Tensor

META = torch.device("meta")


def config_from_header(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> Any:
    """ComfyUI's configuration of the model in `checkpoint`.

    dtype: what to keep the weights in; None chooses as the stock loader does.
    Raises ValueError when ComfyUI doesn't know the model.
    """
    weights = checkpoint.meta
    config = comfy.model_detection.model_config_from_unet(weights, "")
    if config is None:
        weights = comfy.model_detection.convert_diffusers_mmdit(weights, "") or {}
        config = comfy.model_detection.model_config_from_unet(weights, "") if weights else None
    if config is None:
        raise ValueError("ComfyUI does not know a model with these weights; check that the file is whole")
    _fix_sizes(config.unet_config, checkpoint.config)

    load_device = comfy.model_management.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(weights),
            supported_dtypes=supported,
            weight_dtype=comfy.utils.weight_dtype(weights),
        )
    manual_cast = comfy.model_management.unet_manual_cast(dtype, load_device, supported)
    config.set_inference_dtype(dtype, manual_cast)
    return config


def _fix_sizes(unet_config: dict[str, Any], found: dict[str, Any]) -> None:
    """Put in what the header says where ComfyUI takes the sizes of the published models for granted."""
    kind = unet_config.get("image_model")
    if kind not in ("flux", "pixart_alpha", "pixart_sigma"):
        return
    unet_config["num_heads"] = found["num_attention_heads"]
    unet_config["hidden_size"] = found["num_attention_heads"] * found["attention_head_dim"]
    if kind == "flux":
        unet_config["axes_dim"] = list(found["axes_dims_rope"])
        unet_config["context_in_dim"] = found["joint_attention_dim"]
    else:
        unet_config["in_channels"] = found["in_channels"]
        unet_config["caption_channels"] = found["caption_channels"]


def config_of(model: Any) -> Any:
    """The configuration that a loaded ComfyUI model was made with, free to be changed."""
    # Not copy.copy: newer versions answer every attribute they lack with None, __setstate__ among them.
    config = object.__new__(type(model.model_config))
    config.__dict__.update(model.model_config.__dict__)
    config.unet_config = dict(config.unet_config)
    # Layers of a node pack's own know no weights but those that they load.
    config.custom_operations = None
    return config


def build(config: Any, infos: dict[str, Tensor], remote: RemoteModel) -> Any:
    """ComfyUI's model of `config`, its weights absent, its transformer's evaluation done by `remote`.

    infos: key without prefix → tensor; some configurations look at keys once more here. Layers that may be quantised
    make their weights when they are loaded: there they come from these.
    """
    model = config.get_model(dict(infos), "", device=META)
    _complete(model.diffusion_model, infos)
    without_numbers(model, comfy.model_management.get_torch_device())
    # No memory is needed here, so cond and uncond always arrive as one batch when their shapes allow.
    model.memory_usage_factor = 0.0
    model.device = None
    model.remote = remote
    remote.stand_in(model.diffusion_model)
    model.state_dict_for_saving = _refuse_saving
    return model


def _complete(transformer: torch.nn.Module, infos: dict[str, Tensor]) -> None:
    for path, part in transformer.named_modules():
        like = infos.get(f"{path}.weight")
        if like is not None and getattr(part, "weight", None) is None:
            part.weight = torch.nn.Parameter(torch.empty_like(like, device=META), requires_grad=False)


def _refuse_saving(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "this MODEL's weights are on the pool, not in ComfyUI; connect the saving node to the MODEL "
        "in front of Parallel Model (xDiT)"
    )
