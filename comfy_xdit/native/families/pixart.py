"""PixArt: image tokens, and a text that each rank holds whole."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

IMAGE = ("image",)

PIXART = ComfyFamily(
    name="pixart",
    title="PixArt",
    kinds=("PixArtAlpha", "PixArtSigma"),
    plan=TokenPlan(
        blocks=(
            Blocks(path="blocks", takes={"x": Tokens(IMAGE)}, gives=("x",), light=("cross_attn.kv_linear.",)),
        ),
        # It passes no options on to its attention.
        attention={"blocks.*.attn": Attention(IMAGE, seam="optimized_attention")},
    ),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "c_size", "c_ar"),
    latent=first_of("image", lambda transformer: transformer.patch_size),
)
