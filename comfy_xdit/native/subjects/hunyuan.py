"""HunyuanVideo 1.0 and 1.5, and HunyuanImage 2.1."""

from __future__ import annotations

import torch

from comfy_xdit.native.subject import Call, Config, Subject, padded, rand, times

STEPS = {"sample_sigmas": torch.tensor([1.0, 0.7, 0.0]), "sigmas": torch.tensor([0.7])}


def calls(config: Config) -> dict[str, Call]:
    is_video, channels, text = len(config["patch_size"]) == 3, config["in_channels"], config["context_in_dim"]
    size = (3, 10, 12) if is_video else (10, 12)

    def base(batch: int) -> Call:
        call = {"x": rand(batch, channels, *size), "timestep": times(0.7, 0.3)[:batch]}
        call |= {"context": rand(batch, 9, text), "guidance": times(3.5, 2.0)[:batch]}
        call["y"] = rand(batch, config["vec_in_dim"] or 32)
        # Distilled models look up which step comes next.
        return {**call, "transformer_options": STEPS if config["meanflow"] else {}}

    one = base(1)
    found = {"text": one, "batch 2": base(2), "padded": {**one, "attention_mask": padded(1, 9)}}
    if config["byt5"]:
        found["text to be drawn"] = {**one, "txt_byt5": rand(1, 4, 1472)}
    if config.get("vision_in_dim"):
        seen = {**one, "txt_byt5": rand(1, 4, 1472), "clip_fea": rand(1, 7, config["vision_in_dim"])}
        found["an image seen by CLIP"] = {**seen, "disable_time_r": False}
    if config["meanflow"]:
        found["without the next timestep"] = {**one, "disable_time_r": True}
    if is_video and not config.get("vision_in_dim"):
        found["a frame that is given"] = {**one, "guiding_frame_index": times(0)}
        found["a reference"] = {**one, "ref_latent": rand(1, channels, 1, 10, 12)}
    return found


SIZES = {"hidden_size": 80, "num_heads": 5, "depth": 2, "context_in_dim": 48}
SMALL = (*SIZES, "depth_single_blocks", "axes_dim")
VIDEO = {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], **SIZES}
VIDEO |= {"depth_single_blocks": 2, "axes_dim": [4, 6, 6], "vec_in_dim": 32, "mlp_ratio": 4.0, "theta": 256}
VIDEO |= {"qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False}
NEWER = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
IMAGE = {**VIDEO, **NEWER, "patch_size": [1, 1], "axes_dim": [8, 8], "vec_in_dim": None, "byt5": True}
REFINER = {**VIDEO, **NEWER, "patch_size": [1, 1, 1], "in_channels": 32, "vec_in_dim": None, "byt5": True}
FIFTEEN = {**VIDEO, "patch_size": [1, 1, 1], "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "byt5": True}
FIFTEEN |= {"depth_single_blocks": 0, "guidance_embed": False, "use_cond_type_embedding": True, "vision_in_dim": 32}
FIFTEEN |= {"meanflow": True, "meanflow_sum": True}


def subject(kind: str, config: Config, **more: object) -> Subject:
    return Subject(kind=kind, config={**config, **more}, small=SMALL, calls=calls)


HUNYUAN_SUBJECTS = (
    subject("HunyuanVideo", {**VIDEO, **NEWER}),
    subject("HunyuanVideoI2V", {**VIDEO, **NEWER}, in_channels=33),
    subject("HunyuanVideoSkyreelsI2V", {**VIDEO, **NEWER}, in_channels=32),
    subject("HunyuanImage21", IMAGE, guidance_embed=False),
    subject("HunyuanImage21", IMAGE, meanflow=True),
    subject("HunyuanImage21Refiner", REFINER, meanflow=True),
)
HUNYUAN15_SUBJECTS = (
    subject("HunyuanVideo15", FIFTEEN),
    subject("HunyuanVideo15", FIFTEEN, meanflow=False),
    subject("HunyuanVideo15_SR_Distilled", FIFTEEN, in_channels=98),
)
