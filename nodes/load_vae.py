"""The stock VAE loader, for image VAEs of any size."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_xdit_nodes.checkpoint import version_of
from comfy_xdit_nodes.pool import CATEGORY
from torch import Tensor

from comfy_xdit.vae.layout import VAEConfig, describe

STOCK_CHANNELS = (128, 256, 512, 512)
"""ComfyUI's own loader builds every image VAE with these widths, and two blocks for each."""


class XDiTLoadVAE:
    """A VAE whose widths are read from the file."""

    DESCRIPTION = "Loads an image VAE as the stock node does, but of any width and depth, such as the demo's tiny one."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("The VAE, for any VAE node.",)
    FUNCTION = "load_vae"
    SEARCH_ALIASES = ("xdit", "load vae", "tiny vae")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        name = {"tooltip": "A file of models/vae: an AutoencoderKL for images, in ComfyUI's layout."}
        return {"required": {"vae_name": (folder_paths.get_filename_list("vae"), name)}}

    @classmethod
    def IS_CHANGED(cls, vae_name: str) -> str:
        return version_of(folder_paths.get_full_path("vae", vae_name))

    def load_vae(self, vae_name: str) -> tuple[Any]:
        sd = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        config = describe({key: tuple(tensor.shape) for key, tensor in sd.items()})
        if config.block_out_channels == STOCK_CHANNELS and config.layers_per_block == 2:
            vae = comfy.sd.VAE(sd=sd)
        else:
            sd = {key.removeprefix(config.prefix): t for key, t in sd.items() if key.startswith(config.prefix)}
            vae = comfy.sd.VAE(sd=sd | _missing(config), config={"params": host_config(config)})
            # With a config of ours the host keeps its default for SD 1.
            vae.latent_channels = config.latent_channels
            vae.downscale_ratio = vae.upscale_ratio = config.ratio
        vae.throw_exception_if_invalid()
        return (vae,)


def host_config(config: VAEConfig) -> dict[str, Any]:
    """Arguments of ComfyUI's AutoencoderKL. Raises ValueError for widths that it cannot express."""
    narrowest = config.block_out_channels[0]
    if any(width % narrowest for width in config.block_out_channels) or not config.attention:
        raise ValueError(
            f"ComfyUI cannot build a VAE with the widths {list(config.block_out_channels)}"
            f"{'' if config.attention else ' and without attention'}; "
            "use multiples of the first one, and attention in the middle"
        )
    ddconfig = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": narrowest,
        "ch_mult": [width // narrowest for width in config.block_out_channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": ddconfig, "embed_dim": config.latent_channels}


def _missing(config: VAEConfig) -> dict[str, Tensor]:
    """The 1x1 convolutions that ComfyUI builds and the file may lack: those that change nothing."""
    sizes = {}
    if not config.quant_conv:
        sizes["quant_conv"] = 2 * config.latent_channels
    if not config.post_quant_conv:
        sizes["post_quant_conv"] = config.latent_channels
    weights = {f"{name}.weight": torch.eye(size)[:, :, None, None] for name, size in sizes.items()}
    return weights | {f"{name}.bias": torch.zeros(size) for name, size in sizes.items()}
