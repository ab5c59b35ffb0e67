"""The stock VAE nodes, with the VAE's work split over a pool."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_xdit_nodes.pool import CATEGORY, POOL_INPUT, PoolSetting
from comfy_xdit_nodes.vae_remote import config_of, remote_vae
from torch import Tensor

import nodes as host_nodes
from comfy_xdit.messages import VAEDecode, VAEEncode
from comfy_xdit.vae.layout import VAEConfig

log = logging.getLogger("comfy_xdit")

VAE_TOOLTIP = (
    "Any VAE. The image VAEs of Flux, SD3, SDXL and SD 1.5 are split over the workers; "
    "others (tiny, video, audio) are run by ComfyUI itself, and the log says so."
)


class XDiTVAEDecode:
    """Stock `VAEDecode`; each worker decodes a band of the image's rows."""

    DESCRIPTION = (
        "Decodes latent images back into pixel space images, each worker a band of rows. "
        "Gives the image of ComfyUI's VAE Decode, with less memory per GPU the more there are, and no tiles."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded image.",)
    FUNCTION = "decode"
    SEARCH_ALIASES = ("xdit", "vae decode", "latent to image", "multi gpu", "distvae")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        samples = {"tooltip": "The latent to be decoded."}
        return {
            "required": {"samples": ("LATENT", samples), "vae": ("VAE", {"tooltip": VAE_TOOLTIP})},
            "optional": {"pool": POOL_INPUT},
        }

    def decode(self, vae: Any, samples: dict[str, Any], pool: PoolSetting | None = None) -> tuple[Tensor]:
        config = _config(vae, "decodes")
        if config is None:
            return host_nodes.VAEDecode().decode(vae, samples)
        latent = samples["samples"]
        if latent.is_nested:
            latent = latent.unbind()[0]
        return (_decode(vae, config, latent, pool or PoolSetting()),)


class XDiTVAEEncode:
    """Stock `VAEEncode`; each worker encodes a band of the image's rows."""

    DESCRIPTION = (
        "Encodes pixel space images into latent images, each worker a band of rows. "
        "Gives the latent of ComfyUI's VAE Encode."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The encoded latent.",)
    FUNCTION = "encode"
    SEARCH_ALIASES = ("xdit", "vae encode", "image to latent", "multi gpu", "distvae")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        pixels = {"tooltip": "The image to be encoded; its alpha channel, if any, is left out."}
        return {
            "required": {"pixels": ("IMAGE", pixels), "vae": ("VAE", {"tooltip": VAE_TOOLTIP})},
            "optional": {"pool": POOL_INPUT},
        }

    def encode(self, vae: Any, pixels: Tensor, pool: PoolSetting | None = None) -> tuple[dict[str, Tensor]]:
        config = _config(vae, "encodes")
        if config is None:
            return host_nodes.VAEEncode().encode(vae, pixels)
        return ({"samples": _encode(vae, config, pixels, pool or PoolSetting())},)


def _config(vae: Any, does: str) -> VAEConfig | None:
    vae.throw_exception_if_invalid()
    try:
        return config_of(vae)
    except ValueError as reason:
        log.info("ComfyUI %s with this VAE itself, on one device: %s", does, reason)
        return None


def _decode(vae: Any, config: VAEConfig, latent: Tensor, setting: PoolSetting) -> Tensor:
    """latent: [batch, channels, height, width], or one frame of it → image [batch, H, W, 3] in 0..1."""
    if latent.ndim == 5:
        latent = latent[:, :, 0]
    if latent.ndim != 4 or latent.shape[1] != config.latent_channels:
        raise ValueError(
            f"a latent of shape {list(latent.shape)} does not fit this VAE, which decodes "
            f"{config.latent_channels} channels; use the VAE that belongs to the model"
        )
    remote = remote_vae(vae, config)
    image = remote.call(setting, VAEDecode(vae=remote.load.vae, latent=latent))
    # A copy: some versions of ComfyUI process in place.
    image = image.to(device=vae.output_device, dtype=_output_dtype(vae), copy=True)
    return vae.process_output(image).movedim(1, -1)


def _encode(vae: Any, config: VAEConfig, pixels: Tensor, setting: PoolSetting) -> Tensor:
    """pixels: [batch, H, W, 3 or 4] in 0..1 → latent [batch, channels, height, width]."""
    if pixels.ndim != 4 or pixels.shape[3] < 3 or min(pixels.shape[1:3]) < config.ratio:
        raise ValueError(
            f"an image of shape {list(pixels.shape)} cannot be encoded; "
            f"use 3 or 4 channels and at least {config.ratio} x {config.ratio} pixels"
        )
    image = vae.process_input(vae.vae_encode_crop_pixels(pixels[..., :3]).movedim(-1, 1)).to(vae.vae_dtype)
    remote = remote_vae(vae, config)
    moments = remote.call(setting, VAEEncode(vae=remote.load.vae, image=image))
    with torch.no_grad():
        latent, _ = vae.first_stage_model.regularization(moments)
    return latent.to(device=vae.output_device, dtype=_output_dtype(vae))


def _output_dtype(vae: Any) -> torch.dtype:
    """What the stock nodes return: float32, or what newer versions of ComfyUI keep between nodes."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
