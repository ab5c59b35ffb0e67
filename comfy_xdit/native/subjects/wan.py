"""Wan 2.1 and 2.2."""

from __future__ import annotations

import torch

from comfy_xdit.native.subject import Call, Config, Subject, rand, times

from .flux import ROPE


def base(config: Config, batch: int, width: int = 12) -> Call:
    call = {"x": rand(batch, config["in_dim"], 3, 10, width), "timestep": times(0.7, 0.3)[:batch]}
    return {**call, "context": rand(batch, 9, config["text_dim"])}


def video_calls(config: Config) -> dict[str, Call]:
    one = base(config, 1)
    return {
        "video": one,
        "batch 2": base(config, 2),
        "odd sizes": base(config, 1, width=13),
        "frames beside": {**one, "time_dim_concat": rand(1, config["in_dim"], 1, 10, 12)},
        "a scaled rope": {**one, "transformer_options": ROPE},
    }


def calls(config: Config) -> dict[str, Call]:
    found = video_calls(config)
    one, channels = found["video"], config["in_dim"]
    if config["model_type"].startswith("camera"):
        found["a camera"] = {**one, "camera_conditions": rand(1, 24, 3, 80, 96)}
    else:
        frames = {"timestep": times(0, 0.7, 0.4)[None], "denoise_mask": torch.ones(1, 1, 3, 10, 12)}
        found["a timestep for each frame"] = {**one, **frames}
        found["references in context"] = {**one, "context_latents": [rand(1, channels, 1, 6, 8)] * 2}
    if config["model_type"] in ("i2v", "camera"):
        num_seen = config.get("flf_pos_embed_token_number") or 257
        found["an image seen by CLIP"] = {**one, "clip_fea": rand(1, num_seen, 1280)}
    if config.get("in_dim_ref_conv"):
        found["a reference"] = {**one, "reference_latent": rand(1, config["in_dim_ref_conv"], 10, 12)}
    return found


def vace_calls(config: Config) -> dict[str, Call]:
    found = {}
    for name, call in video_calls(config).items():
        batch, _, *size = call["x"].shape
        num = 1 + (batch == 1)
        hints = rand(batch, num, config["vace_in_dim"], size[0] + (name == "frames beside"), *size[1:])
        found[name] = {**call, "vace_context": hints, "vace_strength": [0.8, 0.5][:num]}
    # Its hints are not made even.
    return {name: call for name, call in found.items() if name != "odd sizes"}


SIZES = {"dim": 120, "ffn_dim": 100, "num_heads": 5, "num_layers": 2, "text_dim": 48, "freq_dim": 32, "text_len": 16}
FIXED = {"image_model": "wan2.1", "patch_size": (1, 2, 2), "window_size": (-1, -1), "qk_norm": True, "eps": 1e-6}
FIXED |= {"cross_attn_norm": True, "out_dim": 16}


def subject(kind: str, **config: object) -> Subject:
    return Subject(kind=kind, config={**FIXED, **SIZES, **config}, small=tuple(SIZES), calls=calls)


SUBJECTS = (
    subject("WAN21_T2V", model_type="t2v", in_dim=16),
    subject("WAN21_I2V", model_type="i2v", in_dim=36),
    subject("WAN21_I2V", model_type="i2v", in_dim=36, flf_pos_embed_token_number=514),
    subject("WAN22_T2V", model_type="t2v", in_dim=48, out_dim=48),
    subject("WAN21_FunControl2V", model_type="i2v", in_dim=48, in_dim_ref_conv=16),
    subject("WAN21_Camera", model_type="camera", in_dim=32),
    subject("WAN22_Camera", model_type="camera_2.2", in_dim=36),
)
VACE_SUBJECTS = (
    Subject(
        kind="WAN21_Vace",
        config={**FIXED, **SIZES, "model_type": "vace", "in_dim": 16, "vace_in_dim": 96, "vace_layers": 2},
        small=(*SIZES, "vace_layers"),
        calls=vace_calls,
    ),
)
