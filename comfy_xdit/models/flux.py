"""Flux.1 (dev, schnell, and what shares their blocks): two kinds of blocks, rotary positions, no mask.

Layouts: the single file of Black Forest Labs, which is ComfyUI's too, and diffusers' own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.models.base import Config, Family
from comfy_xdit.models.flux_call import PLAN, inputs, output, output_channels
from comfy_xdit.weights.slices import Infos, Share, Table, block_numbers, respelled, shape_of, stacked, swapped, whole

DOUBLE = "double_blocks.*."
SINGLE = "single_blocks.*."
TARGET = "transformer_blocks.*."
TARGET_1 = "single_transformer_blocks.*."

TABLE: Table = {
    "img_in": whole("x_embedder"),
    "txt_in": whole("context_embedder"),
    "time_in.in_layer": whole("time_text_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": whole("time_text_embed.timestep_embedder.linear_2"),
    "vector_in.in_layer": whole("time_text_embed.text_embedder.linear_1"),
    "vector_in.out_layer": whole("time_text_embed.text_embedder.linear_2"),
    "guidance_in.in_layer": whole("time_text_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": whole("time_text_embed.guidance_embedder.linear_2"),
    DOUBLE + "img_mod.lin": whole(TARGET + "norm1.linear"),
    DOUBLE + "txt_mod.lin": whole(TARGET + "norm1_context.linear"),
    DOUBLE + "img_attn.qkv": stacked(*(f"{TARGET}attn.to_{x}" for x in "qkv")),
    DOUBLE + "txt_attn.qkv": stacked(*(f"{TARGET}attn.add_{x}_proj" for x in "qkv")),
    DOUBLE + "img_attn.norm.query_norm.scale": whole(TARGET + "attn.norm_q.weight"),
    DOUBLE + "img_attn.norm.key_norm.scale": whole(TARGET + "attn.norm_k.weight"),
    DOUBLE + "txt_attn.norm.query_norm.scale": whole(TARGET + "attn.norm_added_q.weight"),
    DOUBLE + "txt_attn.norm.key_norm.scale": whole(TARGET + "attn.norm_added_k.weight"),
    DOUBLE + "img_attn.proj": whole(TARGET + "attn.to_out.0"),
    DOUBLE + "txt_attn.proj": whole(TARGET + "attn.to_add_out"),
    DOUBLE + "img_mlp.0": whole(TARGET + "ff.net.0.proj"),
    DOUBLE + "img_mlp.2": whole(TARGET + "ff.net.2"),
    DOUBLE + "txt_mlp.0": whole(TARGET + "ff_context.net.0.proj"),
    DOUBLE + "txt_mlp.2": whole(TARGET + "ff_context.net.2"),
    SINGLE + "modulation.lin": whole(TARGET_1 + "norm.linear"),
    # The mlp is four times as wide as the model, in every Flux.1.
    SINGLE + "linear1": (
        *stacked(*(f"{TARGET_1}attn.to_{x}" for x in "qkv")),
        Share(TARGET_1 + "proj_mlp", 4),
    ),
    SINGLE + "linear2": whole(TARGET_1 + "proj_out"),
    SINGLE + "norm.query_norm.scale": whole(TARGET_1 + "attn.norm_q.weight"),
    SINGLE + "norm.key_norm.scale": whole(TARGET_1 + "attn.norm_k.weight"),
    "final_layer.linear": whole("proj_out"),
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}


KEYS = (
    "img_in.weight",
    "vector_in.in_layer.weight",
    "double_blocks.0.img_mod.lin.weight",
    "single_blocks.0.modulation.lin.weight",
)
DIFFUSERS_KEYS = (
    "x_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "transformer_blocks.0.norm1_context.linear.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
)


def axes_dims(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared between the three position axes: 2, 7 and 7 of 16 as in Flux.1's
    (16, 56, 56); the first, which is rarely used, takes what rounding down to even numbers leaves."""
    side = head_dim * 7 // 32 * 2
    return head_dim - 2 * side, side, side


def config(infos: Infos) -> Config:
    hidden, channels = shape_of(infos, "img_in.weight", 2)
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    (head_dim,) = shape_of(infos, norm if norm in infos else respelled(norm), 1)
    if hidden % head_dim or head_dim % 2:
        raise InputError(f"heads of {head_dim} channels do not divide Flux's {hidden}; the file is damaged")
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape_of(infos, "final_layer.linear.weight", 2)[0],
        "num_layers": len(block_numbers(infos, "double_blocks")),
        "num_single_layers": len(block_numbers(infos, "single_blocks")),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": shape_of(infos, "txt_in.weight", 2)[1],
        "pooled_projection_dim": shape_of(infos, "vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in infos,
        "axes_dims_rope": axes_dims(head_dim),
    }


@functools.cache
def model_class() -> type:
    """Diffusers' class, but a timestep is not rounded to the model's dtype: in bfloat16 1000 has steps of 4."""
    from diffusers import FluxTransformer2DModel

    class Flux(FluxTransformer2DModel):
        def forward(self, *args: Any, timestep: Tensor, **kwargs: Any) -> Any:
            exact = timestep.to(torch.promote_types(timestep.dtype, torch.float32)) * 1000.0
            embedder: Any = self.time_text_embed  # type: ignore[attr-defined]
            handle = embedder.register_forward_pre_hook(lambda module, given: (exact, *given[1:]))
            try:
                return super().forward(*args, timestep=timestep, **kwargs)  # type: ignore[misc]
            finally:
                handle.remove()

    return Flux


def table(infos: Infos) -> Table:
    return TABLE


FLUX = Family(
    name="flux",
    title="Flux.1",
    keys=KEYS,
    diffusers_keys=DIFFUSERS_KEYS,
    config=config,
    model_class=model_class,
    table=table,
    inputs=inputs,
    output=output,
    output_channels=output_channels,
    plan=PLAN,
)
