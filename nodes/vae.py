"""The stock VAE nodes, with the VAE's work split over a pool."""

from __future__ import annotations

from typing import Any

import torch
from comfy_xdit_nodes.native.vae import VAEOnPool, say_not_carried, source_of
from comfy_xdit_nodes.pool import CATEGORY, POOL_INPUT, PoolSetting
from comfy_xdit_nodes.vae_remote import config_of, remote_vae
from torch import Tensor

import nodes as host_nodes
from comfy_xdit.messages import VAEDecode, VAEEncode
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.vae.layout import VAEConfig

VAE_TOOLTIP = (
    "Any VAE for pictures or videos. The image VAEs of Flux, SD3, SDXL and SD 1.5 are split by rows over the workers; "
    "of others each worker takes some of the batch. What the workers can't have ComfyUI runs itself: the log says so."
)

TILED_TOOLTIP = (
    "Any VAE for pictures or videos; each worker takes some of the tiles. What the workers can't have ComfyUI runs "
    "itself, and the log says so."
)


class XDiTVAEDecode:
    """Stock `VAEDecode`; each worker decodes a band of the image's rows, or some of the batch."""

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
        setting, config = pool or PoolSetting(), _split(vae)
        if config is None:
            return host_nodes.VAEDecode().decode(_carried(vae, "decode", setting), samples)
        latent = samples["samples"]
        if latent.is_nested:
            latent = latent.unbind()[0]
        try:
            return (_decode(vae, config, latent, setting),)
        except PoolError as error:
            return host_nodes.VAEDecode().decode(_in_tiles(vae, "decode", setting, error), samples)


class XDiTVAEEncode:
    """Stock `VAEEncode`; each worker encodes a band of the image's rows, or some of the batch."""

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
        setting, config = pool or PoolSetting(), _split(vae)
        if config is None:
            return host_nodes.VAEEncode().encode(_carried(vae, "encode", setting), pixels)
        try:
            return ({"samples": _encode(vae, config, pixels, setting)},)
        except PoolError as error:
            return host_nodes.VAEEncode().encode(_in_tiles(vae, "encode", setting, error), pixels)


class XDiTVAEDecodeTiled:
    """Stock `VAEDecodeTiled`; its tiles are dealt out to the workers."""

    DESCRIPTION = (
        "Decodes latents in tiles, each worker some of them. Gives the images of ComfyUI's VAE Decode (Tiled): "
        "the same tiles, blended in the same order."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded image, or the frames of the video.",)
    FUNCTION = "decode"
    SEARCH_ALIASES = ("xdit", "vae decode tiled", "latent to video", "multi gpu", "tiles")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _tiled_inputs(host_nodes.VAEDecodeTiled, {"samples": "The latent to be decoded."})

    def decode(
        self, vae: Any, samples: dict[str, Any], pool: PoolSetting | None = None, **tiling: int
    ) -> tuple[Tensor]:
        vae.throw_exception_if_invalid()
        carried = _carried(vae, "decode", pool or PoolSetting())
        return host_nodes.VAEDecodeTiled().decode(vae=carried, samples=samples, **tiling)


class XDiTVAEEncodeTiled:
    """Stock `VAEEncodeTiled`; its tiles are dealt out to the workers."""

    DESCRIPTION = (
        "Encodes images or the frames of a video in tiles, each worker some of them. Gives the latent of ComfyUI's "
        "VAE Encode (Tiled): the same tiles, blended in the same order."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The encoded latent.",)
    FUNCTION = "encode"
    SEARCH_ALIASES = ("xdit", "vae encode tiled", "image to latent", "multi gpu", "tiles")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _tiled_inputs(host_nodes.VAEEncodeTiled, {"pixels": "The images, or frames, to be encoded."})

    def encode(
        self, vae: Any, pixels: Tensor, pool: PoolSetting | None = None, **tiling: int
    ) -> tuple[dict[str, Tensor]]:
        vae.throw_exception_if_invalid()
        carried = _carried(vae, "encode", pool or PoolSetting())
        return host_nodes.VAEEncodeTiled().encode(vae=carried, pixels=pixels, **tiling)


TILED_TOOLTIPS = {
    "vae": TILED_TOOLTIP,
    "tile_size": "Pixels on a side of a tile. Smaller tiles need less memory, and have more seams.",
    "overlap": "Pixels that neighbouring tiles have in common, where they are blended.",
}


def _tiled_inputs(stock: Any, tooltips: dict[str, str]) -> dict[str, Any]:
    """The inputs of a stock node for tiles, each with a tooltip, and a pool."""
    required = {}
    for name, (kind, *rest) in stock.INPUT_TYPES()["required"].items():
        told = {"tooltip": text} if (text := {**TILED_TOOLTIPS, **tooltips}.get(name)) else {}
        required[name] = (kind, {**(rest[0] if rest else {}), **told})
    return {"required": required, "optional": {"pool": POOL_INPUT}}


def _split(vae: Any) -> VAEConfig | None:
    """What the VAE is, when the workers can split it by rows."""
    vae.throw_exception_if_invalid()
    try:
        return config_of(vae)
    except ValueError:
        return None


def _carried(vae: Any, does: str, setting: PoolSetting) -> Any:
    """What a stock node is to work with: the VAE's own class on the pool, or the VAE itself where it can't be there."""
    try:
        return VAEOnPool(vae, source_of(vae, does), setting)
    except ValueError as reason:
        say_not_carried(does, reason)
        return vae


def _in_tiles(vae: Any, does: str, setting: PoolSetting, error: PoolError) -> VAEOnPool:
    """The VAE's own class on the pool, which takes tiles. Raises `error` unless that helps."""
    if error.kind != "memory":
        raise error
    try:
        return VAEOnPool(vae, source_of(vae, does), setting, is_full=True)
    except ValueError:
        raise error from None


def _decode(vae: Any, config: VAEConfig, latent: Tensor, setting: PoolSetting) -> Tensor:
    """latent: [batch, channels, height, width], or one frame of it → image [batch, H, W, 3] in 0..1."""
    if latent.ndim == 5:
        latent = latent[:, :, 0]
    if latent.ndim != 4 or latent.shape[1] != config.latent_channels:
        raise ValueError(
            f"a latent of shape {list(latent.shape)} does not fit this VAE, which decodes "
            f"{config.latent_channels} channels; use the VAE that belongs to the model"
        )
    remote = remote_vae(vae)
    image = remote.call(setting, VAEDecode(vae=remote.load.vae, latent=latent)).value
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
    remote = remote_vae(vae)
    moments = remote.call(setting, VAEEncode(vae=remote.load.vae, image=image)).value
    with torch.no_grad():
        latent, _ = vae.first_stage_model.regularization(moments)
    return latent.to(device=vae.output_device, dtype=_output_dtype(vae))


def _output_dtype(vae: Any) -> torch.dtype:
    """What the stock nodes return: float32, or what newer versions of ComfyUI keep between nodes."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
