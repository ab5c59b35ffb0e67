"""SD3 and SD3.5: text and image attend together, and the image once more by itself in some blocks."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

ATTENTIONS = ("x_block.attn", "x_block.attn2", "context_block.attn")

SD3 = ComfyFamily(
    name="sd3",
    title="SD3",
    kinds=("SD3",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="joint_blocks",
                takes={"args.0": Tokens(("text",)), "args.1": Tokens(("image",))},
                gives=("args.0", "args.1"),
                light=("context_block.attn.", "context_block.mlp."),
                once=("x_block.adaLN_modulation.", "context_block.adaLN_modulation."),
            ),
        ),
        attention={"joint_blocks.*": Attention(("text", "image"), then=(("image",),), or_fewer=True)},
        tensor=tensor_within(
            "joint_blocks.*",
            columns=("x_block.mlp.fc1", "context_block.mlp.fc1"),
            fused={f"{name}.qkv": (1, 1, 1) for name in ATTENTIONS},
            joined=("x_block.adaLN_modulation.1", "context_block.adaLN_modulation.1"),
            rows=(*(f"{name}.proj" for name in ATTENTIONS), "x_block.mlp.fc2", "context_block.mlp.fc2"),
            counts={"x_block.attn": ("num_heads",), "x_block.attn2": ("num_heads",)},
        ),
    ),
    num_heads=lambda transformer: transformer.joint_blocks[0].x_block.attn.num_heads,
    rows=("context", "y"),
    latent=first_of("image", lambda transformer: transformer.patch_size),
)
