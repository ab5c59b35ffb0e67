"""Wan 2.1 and 2.2: video tokens, and a text that each rank holds whole."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

VIDEO = ("video",)

WAN = ComfyFamily(
    name="wan",
    title="Wan",
    kinds=("WAN21_T2V", "WAN21_I2V", "WAN22_T2V"),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="blocks",
                takes={
                    "x": Tokens(VIDEO),
                    # With a timestep for each frame; else it is one for all, of three dims.
                    "e": Tokens(VIDEO, spread=True, ndim=4),
                    "freqs": Tokens(VIDEO),
                },
                gives=("x",),
            ),
        ),
        attention={"blocks.*.self_attn": Attention(VIDEO)},
    ),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "clip_fea", "time_dim_concat", "reference_latent"),
)
