"""SD3 and SD3.5: joint blocks of text and image, learned-size position table, heads of 64 channels.

Layouts: Stability's single file, which is ComfyUI's too, and diffusers' own.
"""

from __future__ import annotations

import math

from comfy_xdit.errors import InputError
from comfy_xdit.models.base import Config, Family
from comfy_xdit.models.sd3_call import PLAN, inputs, output, output_channels
from comfy_xdit.weights.slices import Infos, Table, block_numbers, shape_of, stacked, swapped, whole

IMAGE = "joint_blocks.*.x_block."
TEXT = "joint_blocks.*.context_block."
TARGET = "transformer_blocks.*."
HEAD_DIM = 64

TABLE: Table = {
    "pos_embed": whole("pos_embed.pos_embed"),
    "x_embedder.proj": whole("pos_embed.proj"),
    "context_embedder": whole("context_embedder"),
    "t_embedder.mlp.0": whole("time_text_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": whole("time_text_embed.timestep_embedder.linear_2"),
    "y_embedder.mlp.0": whole("time_text_embed.text_embedder.linear_1"),
    "y_embedder.mlp.2": whole("time_text_embed.text_embedder.linear_2"),
    IMAGE + "adaLN_modulation.1": whole(TARGET + "norm1.linear"),
    IMAGE + "attn.qkv": stacked(*(f"{TARGET}attn.to_{x}" for x in "qkv")),
    IMAGE + "attn.ln_q": whole(TARGET + "attn.norm_q"),
    IMAGE + "attn.ln_k": whole(TARGET + "attn.norm_k"),
    IMAGE + "attn.proj": whole(TARGET + "attn.to_out.0"),
    IMAGE + "attn2.qkv": stacked(*(f"{TARGET}attn2.to_{x}" for x in "qkv")),
    IMAGE + "attn2.ln_q": whole(TARGET + "attn2.norm_q"),
    IMAGE + "attn2.ln_k": whole(TARGET + "attn2.norm_k"),
    IMAGE + "attn2.proj": whole(TARGET + "attn2.to_out.0"),
    IMAGE + "mlp.fc1": whole(TARGET + "ff.net.0.proj"),
    IMAGE + "mlp.fc2": whole(TARGET + "ff.net.2"),
    TEXT + "adaLN_modulation.1": whole(TARGET + "norm1_context.linear"),
    TEXT + "attn.qkv": stacked(*(f"{TARGET}attn.add_{x}_proj" for x in "qkv")),
    TEXT + "attn.ln_q": whole(TARGET + "attn.norm_added_q"),
    TEXT + "attn.ln_k": whole(TARGET + "attn.norm_added_k"),
    TEXT + "attn.proj": whole(TARGET + "attn.to_add_out"),
    TEXT + "mlp.fc1": whole(TARGET + "ff_context.net.0.proj"),
    TEXT + "mlp.fc2": whole(TARGET + "ff_context.net.2"),
    "final_layer.linear": whole("proj_out"),
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}


KEYS = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.mlp.0.weight",
    "joint_blocks.0.x_block.attn.qkv.weight",
    "joint_blocks.0.context_block.attn.qkv.weight",
)
DIFFUSERS_KEYS = (
    "pos_embed.pos_embed",
    "time_text_embed.text_embedder.linear_1.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
)


def config(infos: Infos) -> Config:
    hidden, channels, patch, _ = shape_of(infos, "x_embedder.proj.weight", 4)
    caption, context = shape_of(infos, "context_embedder.weight", 2)
    _, positions, _ = shape_of(infos, "pos_embed", 3)
    blocks = block_numbers(infos, "joint_blocks")
    side = math.isqrt(positions)
    if side * side != positions or hidden % HEAD_DIM:
        raise InputError("SD3's position table is not square, or its width no multiple of 64; the file is damaged")
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape_of(infos, "final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": len(blocks),
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": hidden // HEAD_DIM,
        "joint_attention_dim": context,
        "caption_projection_dim": caption,
        "pooled_projection_dim": shape_of(infos, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(i for i in blocks if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in infos),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in infos else None,
    }


def model_class() -> type:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel


def table(infos: Infos) -> Table:
    """The last block's text half ends after attention; its modulation is shift and scale alone."""
    blocks = block_numbers(infos, "joint_blocks") or block_numbers(infos, "transformer_blocks")
    last = str(blocks[-1])
    return {
        **TABLE,
        (TEXT + "adaLN_modulation.1").replace("*", last): swapped((TARGET + "norm1_context.linear").replace("*", last)),
    }


SD3 = Family(
    name="sd3",
    title="SD3 / SD3.5",
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
