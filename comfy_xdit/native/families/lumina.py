"""Z-Image, Z-Image Omni and Lumina 2: an image that is refined by itself, then after its caption."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of
from comfy_xdit.parallel.tensor_plan import tensor_within
from comfy_xdit.parallel.tokens import Attention, Blocks, Ranges, TokenPlan, Tokens

IMAGE = ("image",)
BOTH = ("caption", "image")
"""The caption's part holds all that comes before the images: captions of references, and what SigLIP saw."""

LUMINA = ComfyFamily(
    name="z-image",
    title="Z-Image",
    kinds=("ZImage", "Lumina2"),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="noise_refiner",
                takes={"x": Tokens(IMAGE), "freqs_cis": Tokens(IMAGE), "timestep_zero_index": Ranges(IMAGE)},
                gives=("x",),
                once=("adaLN_modulation.",),
            ),
            Blocks(
                path="layers",
                takes={"x": Tokens(BOTH), "freqs_cis": Tokens(BOTH), "timestep_zero_index": Ranges(BOTH)},
                gives=("x",),
                once=("adaLN_modulation.",),
            ),
        ),
        attention={"noise_refiner.*.attention": Attention(IMAGE), "layers.*.attention": Attention(BOTH)},
        tensor=tensor_within(
            *("noise_refiner.*", "layers.*"),
            columns=("feed_forward.w1", "feed_forward.w3"),
            fused={"attention.qkv": ("n_local_heads", "n_local_kv_heads", "n_local_kv_heads")},
            # In Z-Image it is the only layer of its list, in Lumina 2 the one after the activation.
            joined=("adaLN_modulation.0", "adaLN_modulation.1"),
            rows=("attention.out", "feed_forward.w2"),
            counts={"attention": ("n_local_heads", "n_local_kv_heads")},
        ),
    ),
    num_heads=lambda transformer: transformer.layers[0].attention.n_local_heads,
    rows=("context", "attention_mask", "clip_text_pooled", "ref_latents", "ref_contexts", "siglip_feats"),
    constants=("num_tokens",),
    options=("rope_options",),
    latent=first_of("image", lambda transformer: transformer.patch_size, unless="ref_latents"),
)
