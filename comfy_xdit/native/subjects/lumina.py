"""Z-Image, Z-Image Omni and Lumina 2."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, padded, rand, times

from .flux import ROPE


def calls(config: Config) -> dict[str, Call]:
    text = config["cap_feat_dim"]

    def base(batch: int, num_text: int) -> Call:
        call = {"x": rand(batch, 16, 11, 13), "timestep": times(0.7, 0.3)[:batch]}
        return {**call, "context": rand(batch, num_text, text), "num_tokens": num_text}

    one = base(1, 9)
    found = {
        "text": one,
        "batch 2": base(2, 40),
        "padded": {**base(2, 9), "attention_mask": padded(2, 9), "num_tokens": 13},
        "pooled text": {**one, "clip_text_pooled": rand(1, config.get("clip_text_dim") or 8)},
        "a scaled rope": {**one, "transformer_options": ROPE},
    }
    if config.get("pad_tokens_multiple"):
        even = {**one, "x": rand(1, 16, 12, 14), "ref_latents": [rand(1, 16, 8, 10), rand(1, 16, 4, 6)]}
        captions = [rand(1, 5, text), rand(1, 3, text), rand(1, 4, text)]
        found["references"] = even
        found["references with captions"] = {**even, "ref_contexts": captions}
        if config.get("siglip_feat_dim"):
            seen = [rand(1, 3, 2, config["siglip_feat_dim"])]
            found["references that SigLIP saw"] = {**even, "ref_contexts": captions, "siglip_feats": seen}
    return found


Z = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 400, "n_layers": 2, "n_refiner_layers": 2}
Z |= {"n_heads": 25, "n_kv_heads": 25, "cap_feat_dim": 48, "axes_dims": [4, 6, 6], "axes_lens": [64, 64, 64]}
Z |= {"qk_norm": True, "rope_theta": 256.0, "z_image_modulation": True, "time_scale": 1000.0}
Z |= {"pad_tokens_multiple": 32, "ffn_dim_multiplier": 3.0}
LUMINA = {**Z, "dim": 96, "n_heads": 6, "n_kv_heads": 2, "rope_theta": 10000.0, "pad_tokens_multiple": None}
LUMINA |= {"z_image_modulation": False, "time_scale": 1.0}
HEADS = ("n_heads", "n_kv_heads", "axes_dims", "axes_lens")
SMALL = (*HEADS, "dim", "n_layers", "n_refiner_layers", "cap_feat_dim", "ffn_dim_multiplier")


def subject(kind: str, config: Config, **more: object) -> Subject:
    return Subject(kind=kind, config={**config, **more}, small=SMALL, calls=calls)


SUBJECTS = (
    subject("ZImage", Z),
    subject("ZImage", Z, siglip_feat_dim=24),
    subject("Lumina2", LUMINA),
    subject("Lumina2", LUMINA, clip_text_dim=24),
)
