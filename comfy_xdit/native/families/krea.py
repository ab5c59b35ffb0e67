"""Krea 2: text, image and references in one sequence."""

from __future__ import annotations

from typing import Any

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.latent_tokens import LatentTokens
from comfy_xdit.parallel.model import Call
from comfy_xdit.parallel.tensor_plan import tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Index, TokenPlan, Tokens

ALL = ("all",)


def latent(transformer: Any, call: Call) -> LatentTokens | None:
    """After the text. Several frames go through it as images of a batch."""
    x, num_text = call["x"], call["context"].shape[1]
    is_image = x.ndim == 4 or x.shape[2] == 1
    return LatentTokens.of(x, "all", side=transformer.patch, first=num_text) if is_image else None


KREA2 = ComfyFamily(
    name="krea2",
    title="Krea 2",
    kinds=("Krea2",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="blocks",
                takes={"x": Tokens(ALL), "freqs": Tokens(ALL, dim=2), "timestep_zero_index": Index(ALL)},
                gives=("x",),
            ),
        ),
        attention={"blocks.*.attn": Attention(ALL)},
        tensor=tensor_within(
            "blocks.*",
            columns=("attn.wq", "attn.wk", "attn.wv", "attn.gate", "mlp.gate", "mlp.up"),
            rows=("attn.wo", "mlp.down"),
            counts={"attn": ("heads", "kvheads")},
        ),
    ),
    patch=lambda transformer: (1, transformer.patch, transformer.patch),
    num_heads=lambda transformer: transformer.heads,
    rows=("context", "ref_latents"),
    constants=("ref_latents_method",),
    latent=latent,
)
