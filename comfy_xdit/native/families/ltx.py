"""LTX-Video: video tokens, and a text that each rank holds whole."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import TensorPlan, tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Refused, TokenPlan, Tokens

VIDEO = ("video",)
GUIDES = Refused("guides of LTX with a strength other than 1, or a mask, are not for several GPUs; use a strength of 1")


def tensor_of(attentions: tuple[str, ...], mlps: tuple[str, ...]) -> TensorPlan:
    """Norms of queries and keys are over all heads; positions are for one each."""
    projections = ("to_q", "to_k", "to_v", "to_gate_logits")
    return tensor_within(
        "transformer_blocks.*",
        columns=(*(f"{a}.{name}" for a in attentions for name in projections), *(f"{mlp}.net.0.proj" for mlp in mlps)),
        rows=(*(f"{a}.to_out.0" for a in attentions), *(f"{mlp}.net.2" for mlp in mlps)),
        counts={a: ("heads",) for a in attentions},
        norms=tuple(f"{a}.{name}" for a in attentions for name in ("q_norm", "k_norm")),
        # Attention to a text has no positions.
        per_head={a: {"pe": 2, "k_pe": 2} for a in attentions if not a.endswith("attn2")},
    )


LTXV = ComfyFamily(
    name="ltxv",
    title="LTX-Video",
    kinds=("LTXV",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="transformer_blocks",
                takes={
                    "x": Tokens(VIDEO),
                    "timestep": Tokens(VIDEO, spread=True),
                    "pe": Tokens(VIDEO),
                    "self_attention_mask": GUIDES,
                },
                gives=("x",),
                light=("attn2.to_k.", "attn2.to_v."),
            ),
        ),
        attention={"transformer_blocks.*.attn1": Attention(VIDEO)},
        tensor=tensor_of(("attn1", "attn2"), ("ff",)),
    ),
    num_heads=lambda transformer: transformer.num_attention_heads,
    rows=("context", "attention_mask", "denoise_mask", "keyframe_idxs"),
    constants=("frame_rate", "guide_attention_entries", "generated_keyframes"),
    latent=first_of("video", lambda transformer: 1, unless="keyframe_idxs"),
)
