"""PixArt (Alpha and Sigma): self-attention of the image, cross-attention to a text that no block changes.

Layouts: the authors' single file, which is ComfyUI's too, and diffusers' own.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from comfy_xdit.errors import InputError
from comfy_xdit.models.base import Config, Family
from comfy_xdit.models.pixart_call import PLAN, inputs, output, output_channels
from comfy_xdit.models.pixart_positions import PatchesWithPositions
from comfy_xdit.weights.slices import Infos, Table, block_numbers, shape_of, stacked, whole

BLOCK = "blocks.*."
TARGET = "transformer_blocks.*."
EMBEDDERS = "adaln_single.emb."
HEAD_DIM = 72

TABLE: Table = {
    "x_embedder.proj": whole("pos_embed.proj"),
    "t_embedder.mlp.0": whole(EMBEDDERS + "timestep_embedder.linear_1"),
    "t_embedder.mlp.2": whole(EMBEDDERS + "timestep_embedder.linear_2"),
    "csize_embedder.mlp.0": whole(EMBEDDERS + "resolution_embedder.linear_1"),
    "csize_embedder.mlp.2": whole(EMBEDDERS + "resolution_embedder.linear_2"),
    "ar_embedder.mlp.0": whole(EMBEDDERS + "aspect_ratio_embedder.linear_1"),
    "ar_embedder.mlp.2": whole(EMBEDDERS + "aspect_ratio_embedder.linear_2"),
    "t_block.1": whole("adaln_single.linear"),
    "y_embedder.y_proj.fc1": whole("caption_projection.linear_1"),
    "y_embedder.y_proj.fc2": whole("caption_projection.linear_2"),
    BLOCK + "scale_shift_table": whole(TARGET + "scale_shift_table"),
    BLOCK + "attn.qkv": stacked(*(f"{TARGET}attn1.to_{x}" for x in "qkv")),
    BLOCK + "attn.proj": whole(TARGET + "attn1.to_out.0"),
    BLOCK + "cross_attn.q_linear": whole(TARGET + "attn2.to_q"),
    BLOCK + "cross_attn.kv_linear": stacked(*(f"{TARGET}attn2.to_{x}" for x in "kv")),
    BLOCK + "cross_attn.proj": whole(TARGET + "attn2.to_out.0"),
    BLOCK + "mlp.fc1": whole(TARGET + "ff.net.0.proj"),
    BLOCK + "mlp.fc2": whole(TARGET + "ff.net.2"),
    "final_layer.linear": whole("proj_out"),
    "final_layer.scale_shift_table": whole("scale_shift_table"),
    # Positions are computed, and training alone drops prompts. The first three are ComfyUI's, the others diffusers'.
    "pos_embed": (),
    "y_embedder.y_embedding": (),
    "pos_embed.pos_embed": (),
    "caption_projection.y_embedding": (),
}

KEYS = (
    "x_embedder.proj.weight",
    "t_block.1.weight",
    "y_embedder.y_proj.fc1.weight",
    "blocks.0.scale_shift_table",
    "blocks.0.cross_attn.kv_linear.weight",
    "blocks.0.mlp.fc1.weight",
)
DIFFUSERS_KEYS = (
    "pos_embed.proj.weight",
    "adaln_single.linear.weight",
    "caption_projection.linear_1.weight",
    "transformer_blocks.0.scale_shift_table",
    "transformer_blocks.0.attn2.to_k.weight",
    "transformer_blocks.0.ff.net.0.proj.weight",
)


def config(infos: Infos) -> Config:
    hidden, channels, patch, _ = shape_of(infos, "x_embedder.proj.weight", 4)
    rows, _ = shape_of(infos, "final_layer.linear.weight", 2)
    if hidden % HEAD_DIM:
        raise InputError(f"PixArt's width is {hidden}, no multiple of {HEAD_DIM}; the file is damaged")
    if rows != 2 * channels * patch**2:
        raise InputError(
            f"PixArt's last layer makes {rows} numbers a token instead of {2 * channels * patch**2}, a noise and its "
            "variance; the file is damaged"
        )
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_layers": len(block_numbers(infos, "blocks")),
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": hidden // HEAD_DIM,
        "cross_attention_dim": hidden,
        "caption_channels": shape_of(infos, "y_embedder.y_proj.fc1.weight", 2)[1],
        "interpolation_scale": interpolation(infos),
        "use_additional_conditions": "ar_embedder.mlp.0.weight" in infos,
    }


def interpolation(infos: Infos) -> int | None:
    """How densely positions lie, as ComfyUI guesses it from a table of them; None, by the picture, without one."""
    if "pos_embed" not in infos:
        return None
    _, positions, _ = shape_of(infos, "pos_embed", 3)
    side = math.isqrt(positions)
    if side * side != positions or side < 32:
        raise InputError(
            f"PixArt's table of {positions} positions is not square, or for less than 512 pixels, which ComfyUI has no "
            "positions for; the file is damaged, or not of PixArt at 512 pixels and more"
        )
    return side // 32


@functools.cache
def model_class() -> type:
    """Diffusers' class, but for how densely positions lie."""
    from diffusers import PixArtTransformer2DModel

    class PixArt(PixArtTransformer2DModel):
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            patches = self.pos_embed  # type: ignore[has-type]
            self.pos_embed = PatchesWithPositions(patches.proj, config["interpolation_scale"])

    return PixArt


def table(infos: Infos) -> Table:
    return TABLE


PIXART = Family(
    name="pixart",
    title="PixArt",
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
