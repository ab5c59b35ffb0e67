"""Wan 2.1 and 2.2: video tokens, and a text that each rank holds whole; VACE with hints of a second list of blocks."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import TensorPlan, tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Rule, TokenPlan, Tokens

VIDEO = ("video",)

HELD: dict[str, Rule] = {"x": Tokens(VIDEO), "freqs": Tokens(VIDEO)}
TEXTS = ("cross_attn.k", "cross_attn.v")

ATTENTIONS = ("self_attn", "cross_attn")


def tensor_of(*blocks: str) -> TensorPlan:
    """Norms of queries and keys are over all heads."""
    return tensor_within(
        *blocks,
        columns=(*(f"{a}.{name}" for a in ATTENTIONS for name in ("q", "k", "v", "k_img", "v_img")), "ffn.0"),
        rows=("self_attn.o", "cross_attn.o", "ffn.2"),
        counts={a: ("num_heads",) for a in ATTENTIONS},
        norms=tuple(f"{a}.norm_{name}" for a in ATTENTIONS for name in ("q", "k", "k_img")),
    )


WAN = ComfyFamily(
    name="wan",
    title="Wan",
    kinds=(
        *("WAN21_T2V", "WAN21_I2V", "WAN21_FunControl2V", "WAN21_Camera"),
        *("WAN22_Camera", "WAN22_T2V"),
    ),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="blocks",
                # e has four dims with a timestep for each frame; else it is one for all, of three.
                takes={**HELD, "e": Tokens(VIDEO, spread=True, ndim=4)},
                gives=("x",),
                light=TEXTS,
            ),
        ),
        attention={"blocks.*.self_attn": Attention(VIDEO)},
        tensor=tensor_of("blocks.*"),
    ),
    num_heads=lambda transformer: transformer.num_heads,
    rows=(
        *("context", "clip_fea", "time_dim_concat", "reference_latent", "context_latents", "denoise_mask"),
        "camera_conditions",
    ),
    options=("rope_options",),
    latent=first_of("video", lambda transformer: transformer.patch_size[-1], unless="reference_latent"),
    text_tokens=512,
)

VACE = ComfyFamily(
    name="wan-vace",
    title="Wan VACE",
    kinds=("WAN21_Vace",),
    plan=TokenPlan(
        blocks=(
            Blocks(path="blocks", takes=HELD, gives=("x",), light=TEXTS),
            Blocks(path="vace_blocks", takes={"c": Tokens(VIDEO), **HELD}, gives=("c", "c"), light=TEXTS),
        ),
        attention={"blocks.*.self_attn": Attention(VIDEO), "vace_blocks.*.self_attn": Attention(VIDEO)},
        tensor=tensor_of("blocks.*", "vace_blocks.*"),
        # A hint may come after the last block.
        join={"head": {"x": Tokens(VIDEO)}},
        in_order=False,
    ),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "time_dim_concat", "vace_context"),
    constants=("vace_strength",),
    options=("rope_options",),
)
