"""Flux.1 (also Fill, Kontext, Canny, Depth, schnell), LongCat-Image and Flux.2: text, then image, then references."""

from __future__ import annotations

import dataclasses

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import TensorPlan, Widths
from comfy_xdit.parallel.tokens import Attention, Blocks, Ranges, Rule, TokenPlan, Tokens

BOTH = ("text", "image")

PLACES = Tokens(BOTH, dim=2)
DOUBLE: dict[str, Rule] = {"img": Tokens(("image",)), "txt": Tokens(("text",)), "pe": PLACES}
SINGLE: dict[str, Rule] = {"x": Tokens(BOTH), "pe": PLACES}


def tensor_of(*mlp: str, shared: tuple[str, ...] = ()) -> TensorPlan:
    """mlp: the pieces that a single block's first matrix has beside queries, keys and values; shared: modulations that
    are made once for all blocks.
    """
    double, single, streams = "double_blocks.*", "single_blocks.*", ("img", "txt")
    both: Widths = (1, 1) if len(mlp) > 1 else (1,)
    return TensorPlan(
        columns=(),
        joined=(*(f"{double}.{name}_mod.lin" for name in streams), f"{single}.modulation.lin", *shared),
        fused={
            **{f"{double}.{name}_attn.qkv": (1, 1, 1) for name in streams},
            **{f"{double}.{name}_mlp.0": both for name in streams},
            f"{single}.linear1": ("hidden_size", "hidden_size", "hidden_size", *mlp),
        },
        rows={
            **{f"{double}.{name}_{last}": (1,) for name in streams for last in ("attn.proj", "mlp.2")},
            f"{single}.linear2": ("hidden_size", "mlp_hidden_dim"),
        },
        counts={double: ("num_heads",), single: ("num_heads", "hidden_size", "mlp_hidden_dim_first")},
    )


TENSOR = tensor_of("mlp_hidden_dim")


def plan_of(
    double: dict[str, Rule], single: dict[str, Rule] | None, tensor: TensorPlan = TENSOR
) -> TokenPlan:
    """single: None where there are no single blocks."""
    text, once = ("txt_attn.", "txt_mlp."), ("img_mod.", "txt_mod.")
    blocks = [Blocks(path="double_blocks", takes=double, gives=("img", "txt"), light=text, once=once)]
    if single is not None:
        blocks.append(Blocks(path="single_blocks", takes=single, gives=("x",), once=("modulation.",)))
    attention = {f"{each.path}.*": Attention(BOTH) for each in blocks}
    return TokenPlan(blocks=tuple(blocks), attention=attention, tensor=tensor)


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
    latent=first_of("image", lambda transformer: transformer.patch_size),
)

# The halves of its MLPs' first matrices are multiplied with each other.
GATED = tensor_of(
    *("mlp_hidden_dim", "mlp_hidden_dim"),
    shared=(
        *(f"double_stream_modulation_{name}.lin" for name in ("img", "txt")),
        "single_stream_modulation.lin",
    ),
)

FLUX2 = dataclasses.replace(
    FLUX, name="flux2", title="Flux.2", kinds=("Flux2",), plan=dataclasses.replace(TIMED, tensor=GATED)
)
