"""Cosmos Predict 2."""

from __future__ import annotations

import torch

from comfy_xdit.native.subject import Call, Config, Subject, rand, times

from .anima import CONFIG, SIZES


def calls(config: Config) -> dict[str, Call]:
    def base(batch: int, frames: int, width: int = 14) -> Call:
        x = rand(batch, config["in_channels"], frames, 10, width)
        context = rand(batch, 9, config["crossattn_emb_channels"])
        return {"x": x, "timestep": times(0.7, 0.3)[:batch], "context": context}

    one = base(1, 3)
    given = {"timestep": times(0, 0.7, 0.7)[None], "denoise_mask": torch.ones(1, 1, 3, 10, 14)}
    return {
        "video": one,
        "batch 2, images": base(2, 1),
        "odd sizes": base(1, 2, width=13),
        "a timestep for each frame": {**one, **given},
        "a frame rate": {**one, "fps": 24},
    }


def subject(kind: str, **more: object) -> Subject:
    config = {**CONFIG, "image_model": "cosmos_predict2", **more}
    return Subject(kind=kind, config=config, small=tuple(SIZES), calls=calls)


SUBJECTS = (
    subject("CosmosT2IPredict2"),
    subject("CosmosI2VPredict2", in_channels=17, rope_h_extrapolation_ratio=3.0, rope_w_extrapolation_ratio=3.0),
)
