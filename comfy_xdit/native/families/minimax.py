"""MiniMax-H3: text, conditions, sound and video in one sequence, which has no dim of the batch."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tensor_plan import tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Ranges, TokenPlan, Tokens

ALL = ("all",)

MINIMAX = ComfyFamily(
    name="minimax-h3",
    title="MiniMax-H3",
    kinds=("MiniMaxH3",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="blocks",
                takes={"x": Tokens(ALL, dim=0), "mod_segments": Ranges(ALL), "rope_freqs": Tokens(ALL)},
                gives=("x",),
                once=("adaln_proj.",),
            ),
        ),
        attention={"blocks.*.attn": Attention(ALL)},
        tensor=tensor_within(
            "blocks.*",
            columns=(),
            fused={"attn.qkv_proj": (1, 1, 1), "mlp.fc1": (1, 1)},
            joined=("adaln_proj.linear",),
            rows=("attn.out_proj", "mlp.fc2"),
            counts={"attn": ("heads",)},
        ),
    ),
    patch=lambda transformer: (1, 2, 2),
    num_heads=lambda transformer: transformer.blocks[0].attn.heads,
    rows=("context",),
    # It takes one row only, so what belongs to it is the same for all.
    constants=("minimax_payload",),
    options=("minimax_h3_sigma_shift_video", "minimax_h3_sigma_shift_audio"),
    prepares=("preprocess_text_embeds",),
    # Of the sizes, the keyframes and the references.
    rebuilt=("minimax_payload.layout",),
    scales=("minimax_payload.audio_scale",),
    max_rows=1,
)
