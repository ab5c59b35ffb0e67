"""Flux.1 (also Fill, Kontext, Canny, Depth, schnell), LongCat-Image and Flux.2: text, then image, then references."""

from __future__ import annotations

import dataclasses

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, Ranges, Rule, TokenPlan, Tokens

BOTH = ("text", "image")

PLACES = Tokens(BOTH, dim=2)
DOUBLE: dict[str, Rule] = {"img": Tokens(("image",)), "txt": Tokens(("text",)), "pe": PLACES}
SINGLE: dict[str, Rule] = {"x": Tokens(BOTH), "pe": PLACES}


def plan_of(double: dict[str, Rule], single: dict[str, Rule] | None) -> TokenPlan:
    """single: None where there are no single blocks."""
    blocks = [Blocks(path="double_blocks", takes=double, gives=("img", "txt"))]
    if single is not None:
        blocks.append(Blocks(path="single_blocks", takes=single, gives=("x",)))
    return TokenPlan(blocks=tuple(blocks), attention={f"{each.path}.*": Attention(BOTH) for each in blocks})


# References, or a frame that is given, have a timestep of their own.
TIMED = plan_of({**DOUBLE, "modulation_dims_img": Ranges(("image",))}, {**SINGLE, "modulation_dims": Ranges(BOTH)})

FLUX = ComfyFamily(
    name="flux",
    title="Flux.1",
    kinds=("Flux", "FluxInpaint", "FluxSchnell", "LongCatImage"),
    plan=plan_of(DOUBLE, SINGLE),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "y", "guidance", "attention_mask", "ref_latents"),
    constants=("ref_latents_method",),
    options=("rope_options",),
)

FLUX2 = dataclasses.replace(FLUX, name="flux2", title="Flux.2", kinds=("Flux2",), plan=TIMED)
