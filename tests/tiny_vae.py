"""Small random VAEs in ComfyUI's layout, and the same as diffusers modules."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfy_xdit.vae import VAEConfig
from comfy_xdit.vae.layout import translate


def config(**changes: object) -> VAEConfig:
    base: dict = {
        "latent_channels": 4,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "quant_conv": True,
        "post_quant_conv": True,
        "attention": True,
    }
    return VAEConfig(**(base | changes))


def ldm_shapes(cfg: VAEConfig) -> dict[str, list[int]]:
    """Every key of the layout with its shape, from the layout's own rules."""
    shapes: dict[str, list[int]] = {}

    def conv(key: str, into: int, out: int, size: int = 3) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = [out, into, size, size], [out]

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = [width], [width]

    def block(key: str, into: int, out: int) -> None:
        norm(f"{key}.norm1", into)
        conv(f"{key}.conv1", into, out)
        norm(f"{key}.norm2", out)
        conv(f"{key}.conv2", out, out)
        if into != out:
            conv(f"{key}.nin_shortcut", into, out, 1)

    def middle(key: str, width: int) -> None:
        block(f"{key}.block_1", width, width)
        block(f"{key}.block_2", width, width)
        if cfg.attention:
            norm(f"{key}.attn_1.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{key}.attn_1.{part}", width, width, 1)

    widths, z = cfg.block_out_channels, cfg.latent_channels
    conv("encoder.conv_in", 3, widths[0])
    for level, width in enumerate(widths):
        for j in range(cfg.layers_per_block):
            into = widths[max(0, level - 1)] if j == 0 else width
            block(f"encoder.down.{level}.block.{j}", into, width)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 2 * z)
    conv("decoder.conv_in", z, widths[-1])
    middle("decoder.mid", widths[-1])
    for level in reversed(range(len(widths))):
        for j in range(cfg.layers_per_block + 1):
            into = widths[min(level + 1, len(widths) - 1)] if j == 0 else widths[level]
            block(f"decoder.up.{level}.block.{j}", into, widths[level])
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", widths[level], widths[level])
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], 3)
    if cfg.quant_conv:
        conv("quant_conv", 2 * z, 2 * z, 1)
    if cfg.post_quant_conv:
        conv("post_quant_conv", z, z, 1)
    return shapes


def random_weights(cfg: VAEConfig, seed: int = 0) -> dict[str, Tensor]:
    """LDM weights whose activations stay near 1, so that an error of 1e-5 means something."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in ldm_shapes(cfg).items():
        tensor = torch.randn(shape, generator=draw)
        if len(shape) > 1:
            weights[key] = tensor / (shape[1] * shape[2] * shape[3]) ** 0.5
        elif key.endswith("bias"):
            weights[key] = tensor * 0.1
        else:
            weights[key] = 1 + tensor * 0.1
    return weights


def write(folder: Path, cfg: VAEConfig, seed: int = 0, prefix: str = "") -> Path:
    path = folder / "vae.safetensors"
    save_file({prefix + key: value for key, value in random_weights(cfg, seed).items()}, path)
    return path


def reference(cfg: VAEConfig, weights: dict[str, Tensor]) -> torch.nn.Module:
    """diffusers' own module with these weights, without any of the code that is tested but `translate`."""
    from diffusers import AutoencoderKL

    depth = len(cfg.block_out_channels)
    vae = AutoencoderKL(
        latent_channels=cfg.latent_channels,
        block_out_channels=cfg.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=cfg.layers_per_block,
        use_quant_conv=cfg.quant_conv,
        use_post_quant_conv=cfg.post_quant_conv,
        mid_block_add_attention=cfg.attention,
    )
    own = vae.state_dict()
    state = {}
    for key, value in weights.items():
        name = translate(key, depth)
        assert name is not None
        state[name] = value.reshape(own[name].shape)
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)
