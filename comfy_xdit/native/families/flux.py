"""Flux.1 (also Fill, Kontext, Canny, Depth, schnell), LongCat-Image and Flux.2: text, then image, then references."""

from __future__ import annotations

import dataclasses

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, Ranges, TokenPlan, Tokens

BOTH = ("text", "image")

DOUBLE = Blocks(
    path="double_blocks",
    takes={
        "img": Tokens(("image",)),
        "txt": Tokens(("text",)),
        "pe": Tokens(BOTH, dim=2),
        "modulation_dims_img": Ranges(("image",)),
        "modulation_dims_txt": Ranges(("text",)),
    },
    gives=("img", "txt"),
)
SINGLE = Blocks(
    path="single_blocks",
    takes={"x": Tokens(BOTH), "pe": Tokens(BOTH, dim=2), "modulation_dims": Ranges(BOTH)},
    gives=("x",),
)
PLAN = TokenPlan(
    blocks=(DOUBLE, SINGLE),
    attention={"double_blocks.*": Attention(BOTH), "single_blocks.*": Attention(BOTH)},
)

FLUX = ComfyFamily(
    name="flux",
    title="Flux.1",
    kinds=("Flux", "FluxInpaint", "FluxSchnell", "LongCatImage"),
    plan=PLAN,
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "y", "guidance", "attention_mask", "ref_latents"),
    constants=("ref_latents_method",),
    options=("rope_options",),
)

FLUX2 = dataclasses.replace(FLUX, name="flux2", title="Flux.2", kinds=("Flux2",))
