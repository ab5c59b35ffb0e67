"""Wan 2.1 and 2.2: video tokens, and a text that each rank holds whole; VACE with hints of a second list of blocks."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

VIDEO = ("video",)

WAN = ComfyFamily(
    name="wan",
    title="Wan",
    kinds=(
        *("WAN21_T2V", "WAN21_I2V", "WAN21_FunControl2V", "WAN21_FlowRVS", "WAN21_Camera"),
        *("WAN22_Camera", "WAN22_T2V"),
    ),
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
    rows=(
        *("context", "clip_fea", "time_dim_concat", "reference_latent", "context_latents", "denoise_mask"),
        "camera_conditions",
    ),
    options=("rope_options",),
)

VACE = ComfyFamily(
    name="wan-vace",
    title="Wan VACE",
    kinds=("WAN21_Vace",),
    plan=TokenPlan(
        blocks=(
            Blocks(path="blocks", takes={"x": Tokens(VIDEO), "freqs": Tokens(VIDEO)}, gives=("x",)),
            Blocks(
                path="vace_blocks",
                takes={"c": Tokens(VIDEO), "x": Tokens(VIDEO), "freqs": Tokens(VIDEO)},
                gives=("c", "c"),
            ),
        ),
        attention={"blocks.*.self_attn": Attention(VIDEO), "vace_blocks.*.self_attn": Attention(VIDEO)},
        # A hint may come after the last block.
        join={"head": {"x": Tokens(VIDEO)}},
        in_order=False,
    ),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "time_dim_concat", "vace_context"),
    constants=("vace_strength",),
    options=("rope_options",),
)
