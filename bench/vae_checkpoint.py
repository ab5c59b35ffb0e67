"""Random image VAEs of a chosen size, in the single-file layout that ComfyUI users have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfy_xdit.vae import VAEConfig

Shapes = dict[str, list[int]]


def ldm_shapes(config: VAEConfig) -> Shapes:
    """Every key of the layout with its shape."""
    widths, latent = config.block_out_channels, config.latent_channels
    shapes: Shapes = {}
    _conv(shapes, "encoder.conv_in", 3, widths[0])
    for level, width in enumerate(widths):
        for j in range(config.layers_per_block):
            into = widths[max(0, level - 1)] if j == 0 else width
            _block(shapes, f"encoder.down.{level}.block.{j}", into, width)
        if level < len(widths) - 1:
            _conv(shapes, f"encoder.down.{level}.downsample.conv", width, width)
    _end(shapes, "encoder", widths[-1], widths[-1], 2 * latent, attention=config.attention)
    _conv(shapes, "decoder.conv_in", latent, widths[-1])
    for level in reversed(range(len(widths))):
        for j in range(config.layers_per_block + 1):
            into = widths[min(level + 1, len(widths) - 1)] if j == 0 else widths[level]
            _block(shapes, f"decoder.up.{level}.block.{j}", into, widths[level])
        if level > 0:
            _conv(shapes, f"decoder.up.{level}.upsample.conv", widths[level], widths[level])
    _end(shapes, "decoder", widths[-1], widths[0], 3, attention=config.attention)
    if config.quant_conv:
        _conv(shapes, "quant_conv", 2 * latent, 2 * latent, 1)
    if config.post_quant_conv:
        _conv(shapes, "post_quant_conv", latent, latent, 1)
    return shapes


def random_vae(config: VAEConfig, seed: int = 0) -> dict[str, Tensor]:
    """float32 weights that keep activations near 1, so that an absolute error of 1e-5 means something."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in ldm_shapes(config).items():
        tensor = torch.randn(shape, generator=draw)
        if len(shape) > 1:
            weights[key] = tensor / (shape[1] * shape[2] * shape[3]) ** 0.5
        else:
            weights[key] = tensor * 0.1 + (0 if key.endswith("bias") else 1)
    return weights


def write_vae(path: Path, config: VAEConfig, *, seed: int = 0, prefix: str = "") -> Path:
    """Write `random_vae` to `path`, every key behind `prefix`, and return it."""
    save_file({prefix + key: value for key, value in random_vae(config, seed).items()}, str(path))
    return path


def _conv(shapes: Shapes, key: str, into: int, out: int, size: int = 3) -> None:
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = [out, into, size, size], [out]


def _norm(shapes: Shapes, key: str, width: int) -> None:
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = [width], [width]


def _block(shapes: Shapes, key: str, into: int, out: int) -> None:
    _norm(shapes, f"{key}.norm1", into)
    _conv(shapes, f"{key}.conv1", into, out)
    _norm(shapes, f"{key}.norm2", out)
    _conv(shapes, f"{key}.conv2", out, out)
    if into != out:
        _conv(shapes, f"{key}.nin_shortcut", into, out, 1)


def _end(shapes: Shapes, half: str, middle: int, last: int, out: int, *, attention: bool) -> None:
    """The middle of a half, `middle` wide, and its last norm and convolution, `last` wide."""
    _block(shapes, f"{half}.mid.block_1", middle, middle)
    _block(shapes, f"{half}.mid.block_2", middle, middle)
    if attention:
        _norm(shapes, f"{half}.mid.attn_1.norm", middle)
        for part in ("q", "k", "v", "proj_out"):
            _conv(shapes, f"{half}.mid.attn_1.{part}", middle, middle, 1)
    _norm(shapes, f"{half}.norm_out", last)
    _conv(shapes, f"{half}.conv_out", last, out)
