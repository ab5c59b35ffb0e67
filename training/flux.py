"""Training of the tiny Flux and of its LoRA, in the layout that their files have.

The trained tensors lie in ComfyUI's layout (qkv fused); diffusers' module is run with slices of them, so
gradients reach a fused weight, and a LoRA for it, directly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from comfy_xdit.demo import words
from comfy_xdit.demo.assets import SCALE, SHIFT
from comfy_xdit.demo.pictures import Scene, as_tensor, draw, random_scene
from comfy_xdit.models.flux import TABLE
from comfy_xdit.weights.slices import SliceMap, by_source, fused, slice_map

CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": words.DIM,
    "pooled_projection_dim": words.DIM,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
RANK = 8
# Prompts dropped in training, so that the model also knows what "no prompt" looks like: what cfg > 1 needs.
DROPPED = 0.1


def new_flux() -> tuple[Any, dict[str, Tensor], SliceMap]:
    """diffusers' module, its weights in ComfyUI's layout, and which slices of them the module's are."""
    from diffusers import FluxTransformer2DModel

    module: Any = FluxTransformer2DModel(**CONFIG)
    own = module.state_dict()
    # As DiT is started: blocks that add nothing yet, and an output of zero.
    for key, tensor in own.items():
        if "norm1" in key or ".norm.linear" in key or "norm_out" in key or key.startswith("proj_out"):
            tensor.zero_()
    targets = slice_map(TABLE, fused(TABLE, own))
    weights = {}
    for source, parts in by_source(targets).items():
        rows = [own[target][piece.target_row : piece.target_row + piece.rows] for target, piece in parts]
        weights[source] = torch.cat(rows).clone()
    return module, weights, targets


def in_diffusers_layout(weights: Mapping[str, Tensor], targets: SliceMap) -> dict[str, Tensor]:
    out = {}
    for target, pieces in targets.items():
        rows = [weights[p.source][p.source_row : p.source_row + p.rows] for p in pieces]
        out[target] = torch.cat(rows) if len(rows) > 1 else rows[0]
    return out


def new_lora(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """kohya's names: down [RANK, in], up [out, RANK] for every matrix of the blocks; up starts at zero."""
    chance = torch.Generator().manual_seed(seed)
    lora = {}
    for key, weight in weights.items():
        if key.startswith(("double_blocks.", "single_blocks.")) and weight.ndim == 2:
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            down = torch.randn(RANK, weight.shape[1], generator=chance) / weight.shape[1] ** 0.5
            lora[f"{name}.lora_down.weight"] = down
            lora[f"{name}.lora_up.weight"] = torch.zeros(weight.shape[0], RANK)
    return lora


def with_lora(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the LoRA added at strength 1."""
    out = dict(weights)
    for key, weight in weights.items():
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if f"{name}.lora_up.weight" in lora:
            out[key] = weight + lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
    return out


def patches_of(latent: Tensor) -> Tensor:
    """[batch, 16, height, width] → [batch, height / 2 · width / 2, 64], as Flux cuts its latents."""
    batch, channels, height, width = latent.shape
    cells = latent.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def latent_of(patches: Tensor, height: int, width: int) -> Tensor:
    """The other way round."""
    batch, _, parts = patches.shape
    cells = patches.view(batch, height // 2, width // 2, parts // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, parts // 4, height, width)


def velocity(
    module: Any, weights: Mapping[str, Tensor], x: Tensor, t: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """The model's noise minus picture at noise level t [batch] in 0..1; x [batch, 16, height, width].

    weights: in diffusers' layout.
    """
    height, width = x.shape[2:]
    row, column = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).float()
    arguments = {
        "hidden_states": patches_of(x),
        "timestep": t,
        "encoder_hidden_states": context,
        "pooled_projections": pooled,
        "img_ids": ids,
        "txt_ids": torch.zeros(context.shape[1], 3),
        "return_dict": False,
    }
    out = functional_call(module, dict(weights), (), arguments)[0]
    return latent_of(out.float(), height, width)


def scenes_to_learn(seed: int, num: int) -> list[Scene]:
    """`num` scenes: two thirds by chance, the others with the demo's own prompts."""
    chance = random.Random(seed)
    scenes = [random_scene(chance) for _ in range(num)]
    for number in range(0, num, 3):
        scenes[number] = random_scene(chance, prompt=chance.choice(words.PROMPTS))
    return scenes


@torch.no_grad()
def encode_pictures(vae: Any, scenes: list[Scene], *, outlined: bool) -> Tensor:
    """Latents as the transformer takes them, [scenes, 16, 16, 16] in bfloat16."""
    latents = []
    for first in range(0, len(scenes), 16):
        images = as_tensor([draw(scene, outlined=outlined) for scene in scenes[first : first + 16]])
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(images.contiguous()).latent_dist.mean
        latents.append(((mean.float() - SHIFT) * SCALE).bfloat16())
    return torch.cat(latents)


def batch_loss(
    module: Any, weights: Mapping[str, Tensor], latents: Tensor, scenes: list[Scene], picks: list[int]
) -> Tensor:
    """Rectified flow's loss on the pictures `picks`, which have prompts of one length."""
    x0 = latents[picks].float()
    encoded = [words.encode(scenes[pick].prompt) for pick in picks]
    keep = (torch.rand(len(picks)) >= DROPPED).float()
    context = torch.cat([context for context, _ in encoded]) * keep[:, None, None]
    pooled = torch.cat([pooled for _, pooled in encoded]) * keep[:, None]
    # Mostly noisy ones: what shape it will be is decided there, and later steps keep to it.
    t = torch.rand(len(picks)).sqrt()
    noise = torch.randn_like(x0)
    x = torch.lerp(x0, noise, t[:, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        out = velocity(module, weights, x, t, context, pooled)
    return F.mse_loss(out, noise - x0)


@torch.no_grad()
def sample(
    module: Any,
    weights: Mapping[str, Tensor],
    prompt: str,
    *,
    seed: int,
    num_steps: int = 20,
    cfg: float = 2.5,
) -> Tensor:
    """Euler's method from noise to a latent [1, 16, 16, 16], still scaled as the transformer has it."""
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
    context, pooled = words.encode(prompt)
    context, pooled = torch.cat([context, context * 0]), torch.cat([pooled, pooled * 0])
    levels = torch.linspace(1, 0, num_steps + 1)
    for level, lower in itertools.pairwise(levels):
        cond, uncond = velocity(module, weights, x.expand(2, -1, -1, -1), level.expand(2), context, pooled)
        x = x + (lower - level) * (uncond + cfg * (cond - uncond))
    return x
