"""Small image VAEs for tests, and the same as diffusers modules."""

from __future__ import annotations

import torch
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
