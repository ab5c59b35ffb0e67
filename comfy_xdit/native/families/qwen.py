"""Qwen-Image, Edit and Layered: text and image side by side in each block, references after the image."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, Index, TokenPlan, Tokens

BOTH = ("text", "image")

QWEN = ComfyFamily(
    name="qwen-image",
    title="Qwen-Image",
    kinds=("QwenImage",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="transformer_blocks",
                takes={
                    "hidden_states": Tokens(("image",)),
                    "encoder_hidden_states": Tokens(("text",)),
                    "encoder_hidden_states_mask": Tokens(("text",)),
                    "image_rotary_emb": Tokens(BOTH, dim=2),
                    "timestep_zero_index": Index(("image",)),
                },
                gives=("encoder_hidden_states", "hidden_states"),
            ),
        ),
        # The mask is made inside of the block, of the text that the rank has.
        attention={"transformer_blocks.*.attn": Attention(BOTH, mask="own")},
    ),
    num_heads=lambda transformer: int(transformer.transformer_blocks[0].attn.heads),
    rows=("context", "attention_mask", "ref_latents"),
    constants=("ref_latents_method", "additional_t_cond"),
)
