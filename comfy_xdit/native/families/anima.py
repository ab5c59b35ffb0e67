"""Anima: Cosmos Predict 2's blocks over an image, which stays a grid; a text that each rank holds whole."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

from .cosmos import ONCE, TENSOR, TEXTS, patch_of

IMAGE = ("image",)

ANIMA = ComfyFamily(
    name="anima",
    title="Anima",
    kinds=("Anima",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="blocks",
                takes={"x_B_T_H_W_D": Tokens(IMAGE, grid=3), "rope_emb_L_1_1_D": Tokens(IMAGE)},
                gives=("x_B_T_H_W_D",),
                light=TEXTS,
                once=ONCE,
            ),
        ),
        attention={"blocks.*.self_attn": Attention(IMAGE)},
        tensor=TENSOR,
    ),
    patch=patch_of,
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context",),
    prepares=("preprocess_text_embeds",),
    latent=first_of("image", lambda transformer: transformer.patch_spatial),
)
