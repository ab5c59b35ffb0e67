"""What a file in ComfyUI's (LDM) VAE layout holds, and what diffusers calls each part of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError

Shapes = Mapping[str, Sequence[int]]

PREFIXES = ("", "first_stage_model.", "vae.")
"""Where the VAE starts: alone in its file, in an all-in-one checkpoint, in some exports of one."""

NORM_GROUPS = 32
"""Groups of every norm in this layout: the number is written nowhere in a file."""

# Left in some published files by training; no part of the VAE.
_IGNORED = ("loss.", "model_ema.")

_RENAMES = (
    (r"^(encoder|decoder)\.(conv_in|conv_out)\.", r"\1.\2."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^(encoder|decoder)\.mid\.block_([12])\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^(quant_conv|post_quant_conv)\.", r"\1."),
)

_LEAVES = {
    "resnets": {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "nin_shortcut": "conv_shortcut",
    },
    "attentions": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    "downsamplers": {"conv": "conv"},
    "upsamplers": {"conv": "conv"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """An `AutoencoderKL`, as far as a file's header tells it.

    block_out_channels: widths from the image inwards, the same in encoder and decoder.
    prefix: what the VAE's keys start with in the file.
    """

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    quant_conv: bool
    post_quant_conv: bool
    attention: bool
    prefix: str = ""

    @property
    def ratio(self) -> int:
        """Pixels per latent pixel, along height and width alike."""
        return 2 ** (len(self.block_out_channels) - 1)

    def build(self) -> nn.Module:
        """The `AutoencoderKL` of diffusers, on the meta device: names and shapes, no memory."""
        from diffusers import AutoencoderKL

        depth = len(self.block_out_channels)
        with torch.device("meta"):
            vae: Any = AutoencoderKL(
                latent_channels=self.latent_channels,
                block_out_channels=self.block_out_channels,
                down_block_types=("DownEncoderBlock2D",) * depth,
                up_block_types=("UpDecoderBlock2D",) * depth,
                layers_per_block=self.layers_per_block,
                norm_num_groups=NORM_GROUPS,
                use_quant_conv=self.quant_conv,
                use_post_quant_conv=self.post_quant_conv,
                mid_block_add_attention=self.attention,
            )
        return vae.eval().requires_grad_(False)


def translate(key: str, num_blocks: int) -> str | None:
    """diffusers' name of the weight that LDM calls `key` (without prefix); None when it has none."""
    for pattern, name in _RENAMES:
        stem, found = re.subn(pattern, name, key, count=1)
        if found:
            break
    else:
        return None
    # LDM numbers the decoder's stages from the image inwards, diffusers in the order they run.
    stem = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up_blocks.{num_blocks - 1 - int(m[1])}.", stem)
    for part, leaves in _LEAVES.items():
        inside = re.fullmatch(rf"(.*\.{part}\.\d+\.)(\w+)\.(weight|bias)", stem)
        if inside:
            return f"{inside[1]}{leaves[inside[2]]}.{inside[3]}" if inside[2] in leaves else None
    return stem if re.fullmatch(r"[\w.]*?\w+\.(weight|bias)", stem) else None


def describe(shapes: Shapes) -> VAEConfig:
    """What the VAE with these keys and shapes is.

    Raises InputError, naming what does not fit, for anything but an AutoencoderKL for RGB images:
    tiny VAEs, video and audio VAEs, VAEs with normalised or packed latents.
    """
    prefix = next((p for p in PREFIXES if f"{p}decoder.conv_in.weight" in shapes), None)
    if prefix is None:
        raise InputError("not an AutoencoderKL in ComfyUI's layout: it has no decoder.conv_in.weight")
    own = {k[len(prefix) :]: tuple(s) for k, s in shapes.items() if k.startswith(prefix)}
    own = {key: shape for key, shape in own.items() if not key.startswith(_IGNORED)}
    widths = _widths(own, "encoder.down")
    if widths != _widths(own, "decoder.up"):
        raise InputError(f"its encoder has the widths {widths}, its decoder {_widths(own, 'decoder.up')}")
    if not widths or any(width % NORM_GROUPS for width in widths):
        raise InputError(f"its widths {widths} are not multiples of {NORM_GROUPS}")
    unknown = [key for key in own if translate(key, len(widths)) is None]
    if unknown:
        raise InputError(f"it has parts that an AutoencoderKL has not: {', '.join(sorted(unknown)[:3])}")
    latent_channels = _image_ends(own)
    layers = {re.match(r"encoder\.down\.0\.block\.(\d+)\.", key) for key in own} - {None}
    return VAEConfig(
        latent_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=len({match[1] for match in layers if match}),
        quant_conv="quant_conv.weight" in own,
        post_quant_conv="post_quant_conv.weight" in own,
        attention="decoder.mid.attn_1.q.weight" in own,
        prefix=prefix,
    )


def _widths(own: Shapes, stages: str) -> tuple[int, ...]:
    """Output channels of the stages, from the image inwards."""
    found = {}
    for key, shape in own.items():
        match = re.fullmatch(rf"{re.escape(stages)}\.(\d+)\.block\.0\.conv1\.weight", key)
        if match:
            found[int(match[1])] = shape[0]
    return tuple(found.get(stage, 0) for stage in range(max(found, default=-1) + 1))


def _image_ends(own: Shapes) -> int:
    """The latent's channels, when both ends are RGB images and the latent is the same on both sides."""
    latent = own["decoder.conv_in.weight"]
    needed = {
        "decoder.conv_in.weight": (1, latent[1]),
        "encoder.conv_in.weight": (1, 3),
        "decoder.conv_out.weight": (0, 3),
        "encoder.conv_out.weight": (0, 2 * latent[1]),
        "quant_conv.weight": (0, 2 * latent[1]),
        "post_quant_conv.weight": (1, latent[1]),
    }
    for key, (dim, size) in needed.items():
        shape = own.get(key)
        if shape is None and "quant" in key:
            continue
        if shape is None or len(shape) != 4 or shape[dim] != size:
            raise InputError(f"its {key} is {shape}; dim {dim} of 4 would have to be {size}")
    return latent[1]
