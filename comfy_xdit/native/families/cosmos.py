"""Cosmos Predict 2: video tokens on a grid of frames, rows and columns, and a text that each rank holds whole."""

from __future__ import annotations

from typing import Any

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Rule, TokenPlan, Tokens

VIDEO = ("video",)

ATTENTIONS = ("self_attn", "cross_attn")

TENSOR = tensor_within(
    "blocks.*",
    columns=(*(f"{a}.{name}_proj" for a in ATTENTIONS for name in "qkv"), "mlp.layer1"),
    rows=(*(f"{a}.output_proj" for a in ATTENTIONS), "mlp.layer2"),
    counts={a: ("n_heads",) for a in ATTENTIONS},
)

TAKES: dict[str, Rule] = {
    "x_B_T_H_W_D": Tokens(VIDEO, grid=3),
    "rope_emb_L_1_1_D": Tokens(VIDEO),
    # With a timestep for each frame; else it is one for all.
    **dict.fromkeys(("emb_B_T_D", "adaln_lora_B_T_3D"), Tokens(VIDEO, spread=True)),
}

TEXTS, ONCE = ("cross_attn.k_proj.", "cross_attn.v_proj."), ("adaln_modulation_",)


def patch_of(transformer: Any) -> tuple[int, int, int]:
    return (transformer.patch_temporal, transformer.patch_spatial, transformer.patch_spatial)


COSMOS = ComfyFamily(
    name="cosmos",
    title="Cosmos Predict 2",
    kinds=("CosmosT2IPredict2", "CosmosI2VPredict2"),
    plan=TokenPlan(
        blocks=(Blocks(path="blocks", takes=TAKES, gives=("x_B_T_H_W_D",), light=TEXTS, once=ONCE),),
        attention={"blocks.*.self_attn": Attention(VIDEO)},
        tensor=TENSOR,
    ),
    patch=patch_of,
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "denoise_mask"),
    constants=("fps",),
    latent=first_of("video", lambda transformer: transformer.patch_spatial),
)
