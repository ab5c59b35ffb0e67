"""LTX-Video: video tokens, and a text that each rank holds whole."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, Refused, TokenPlan, Tokens

VIDEO = ("video",)
GUIDES = Refused("guides of LTX with a strength other than 1, or a mask, are not for several GPUs; use a strength of 1")

LTXV = ComfyFamily(
    name="ltxv",
    title="LTX-Video",
    kinds=("LTXV",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="transformer_blocks",
                takes={
                    "x": Tokens(VIDEO),
                    "timestep": Tokens(VIDEO, spread=True),
                    "pe": Tokens(VIDEO),
                    "self_attention_mask": GUIDES,
                },
                gives=("x",),
            ),
        ),
        attention={"transformer_blocks.*.attn1": Attention(VIDEO)},
    ),
    num_heads=lambda transformer: transformer.num_attention_heads,
    rows=("context", "attention_mask", "denoise_mask", "keyframe_idxs"),
    constants=("frame_rate", "guide_attention_entries", "generated_keyframes"),
)
