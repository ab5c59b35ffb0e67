"""Chroma: Flux.1's blocks, modulated by vectors that are made once for all of them."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of

from .flux import DOUBLE, SINGLE, plan_of

CHROMA = ComfyFamily(
    name="chroma",
    title="Chroma",
    kinds=("Chroma",),
    plan=plan_of(DOUBLE, SINGLE),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "y", "guidance", "attention_mask"),
    latent=first_of("image", lambda transformer: transformer.patch_size),
)
