"""Qwen-Image, Edit and Layered."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, padded, rand, times


def calls(config: Config) -> dict[str, Call]:
    text = config["joint_attention_dim"]
    one = {"x": rand(1, 16, 1, 11, 13), "timestep": times(0.7), "context": rand(1, 9, text)}
    two = {"x": rand(2, 16, 1, 11, 13), "timestep": times(0.7, 0.3), "context": rand(2, 9, text)}
    edit: Call = {**one, "ref_latents": [rand(1, 16, 1, 6, 8), rand(1, 16, 1, 5, 4)]}
    found: dict[str, Call] = {
        "text": one,
        "batch 2, padded": {**two, "attention_mask": padded(2, 9)},
        "layers": {**one, "x": rand(1, 16, 3, 6, 8)},
    }
    for method in ("index", "negative_index", "index_timestep_zero", "offset"):
        found[f"references by {method}"] = {**edit, "ref_latents_method": method}
    if config.get("use_additional_t_cond"):
        found["layered"] = {**edit, "additional_t_cond": times(0).long()}
    return found


SIZES = {"attention_head_dim": 16, "num_attention_heads": 5, "joint_attention_dim": 48, "axes_dims_rope": (4, 6, 6)}
PLAIN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, **SIZES}

SUBJECTS = (
    Subject(kind="QwenImage", config=PLAIN, small=("num_layers", *SIZES), calls=calls),
    Subject(
        kind="QwenImage",
        config={**PLAIN, "default_ref_method": "negative_index", "use_additional_t_cond": True},
        small=("num_layers", *SIZES),
        calls=calls,
    ),
)
