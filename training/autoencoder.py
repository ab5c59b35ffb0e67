"""Training of the tiny VAE, and its keys on disk: ComfyUI's (LDM's) layout."""

from __future__ import annotations

import logging
import math
import random
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comfy_xdit.demo.assets import SCALE, SHIFT
from comfy_xdit.demo.pictures import as_tensor, draw, random_scene

log = logging.getLogger("comfy_xdit")

CONFIG: dict[str, Any] = {
    "block_out_channels": (64, 64, 64, 64),
    "latent_channels": 16,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


# Whole pictures are too slow for most of the steps.
CROP = 64


def new_vae() -> Any:
    """A VAE that starts near a plain pyramid: resampling by averages, and residual branches at zero.

    64 channels all along: ComfyUI's norms always have 32 groups, and a group of a single channel would
    lose the colour of a flat ground. Learns several times faster than from diffusers' own start.
    """
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**CONFIG)
    module: Any
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif "samplers" in name and isinstance(module, torch.nn.Conv2d):
            every = range(module.out_channels)
            with torch.no_grad():
                module.weight.mul_(0.3)
                if "down" in name:
                    module.weight[every, every, :2, :2] += 0.25
                else:
                    module.weight[every, every, 1, 1] += 1
                if module.bias is not None:
                    module.bias.zero_()
    return vae


def batch_of_pictures(chance: random.Random, num: int, *, crop: int | None) -> Tensor:
    """[num, 3, side, side]: plain and outlined ones in turn, all cut to one window of `crop` pixels."""
    images = as_tensor([draw(random_scene(chance, anywhere=True), outlined=i % 2 == 1) for i in range(num)])
    if crop is None:
        return images
    top, left = (chance.randrange(images.shape[-1] - crop + 1) for _ in range(2))
    return images[..., top : top + crop, left : left + crop]


def train_step(vae: Any, optimizer: torch.optim.Optimizer, images: Tensor, *, noise: float) -> float:
    """One step on L1 + L2; returns the mean absolute error, in -1..1 units.

    The latent gets a fixed amount of noise, so that neighbours decode alike; the variance that the
    encoder states is taught to be that amount. Sampling by the variance from the start would drown a new
    encoder's small latents.
    """
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.encode(images).latent_dist
        mean, logvar = moments.mean.float(), moments.logvar.float()
        out = vae.decode(mean + torch.randn_like(mean) * noise).sample.float()
    error = (out - images).abs().mean()
    loss = error + F.mse_loss(out, images) + 1e-3 * mean.square().mean()
    loss = loss + 1e-3 * (logvar - 2 * math.log(noise)).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return error.item()


def skip_finest(vae: Any, skip: bool) -> None:
    """Leave out, or let in, the residual branches at full size: two thirds of the work.

    They start at zero, so letting them in later changes nothing at that moment.
    """
    for block in (*vae.encoder.down_blocks[0].resnets, *vae.decoder.up_blocks[-1].resnets):
        if skip:
            block.forward = lambda hidden, temb=None: hidden
        else:
            block.__dict__.pop("forward", None)


@torch.no_grad()
def normalise(vae: Any, images: Tensor) -> None:
    """Give (latent - SHIFT) · SCALE mean 0 and variance 1 per channel, by the layers on both sides of it.

    The decoder's first convolution pads with zeros, which a shift doesn't keep: it has to learn on a little.
    """
    latent = vae.encode(images).latent_dist.mean.float()
    mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3)).clamp_min(1e-3)
    gain = 1 / (std * SCALE)
    num = CONFIG["latent_channels"]
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[:num] *= gain[:, None, None, None]
    last.bias[:num] = (last.bias[:num] - mean) * gain + SHIFT
    last.bias[num:] += 2 * gain.log()
    first.bias += (first.weight.sum((2, 3)) * (mean - SHIFT / gain)).sum(1)
    first.weight /= gain[None, :, None, None]


def ldm_state_dict(vae: Any) -> dict[str, Tensor]:
    """The VAE's weights under the keys that ComfyUI's VAE files have."""
    num_levels = len(CONFIG["block_out_channels"])
    out = {}
    for key, tensor in vae.state_dict().items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
        # LDM counts the decoder's levels from the finest.
        key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{num_levels - 1 - int(m[1])}.", key)
        key = key.replace(".resnets.", ".block.") if ".up." in key else key
        key = key.replace(".upsamplers.0.", ".upsample.")
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm.", "norm.")
        for ours, theirs in (("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out.")):
            key = key.replace(ours, theirs)
        key = key.replace("conv_shortcut.", "nin_shortcut.").replace("conv_norm_out.", "norm_out.")
        if "mid.attn_1." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[key] = tensor
    return out
