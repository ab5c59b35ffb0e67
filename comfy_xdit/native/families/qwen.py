"""Qwen-Image, Edit and Layered: text and image side by side in each block, references after the image."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Index, TokenPlan, Tokens

BOTH = ("text", "image")

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

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
                light=("txt_mlp.", "attn.add_", "attn.to_add_out."),
                once=("img_mod.", "txt_mod."),
            ),
        ),
        # The mask is made inside of the block, of the text that the rank has.
        attention={"transformer_blocks.*.attn": Attention(BOTH, mask="own")},
        tensor=tensor_within(
            "transformer_blocks.*",
            columns=(*(f"attn.{name}" for name in PROJECTIONS), "img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
            joined=("img_mod.1", "txt_mod.1"),
            rows=("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"),
            counts={"attn": ("heads",)},
        ),
    ),
    num_heads=lambda transformer: int(transformer.transformer_blocks[0].attn.heads),
    rows=("context", "attention_mask", "ref_latents"),
    constants=("ref_latents_method", "additional_t_cond"),
    latent=first_of("image", lambda transformer: transformer.patch_size),
)
