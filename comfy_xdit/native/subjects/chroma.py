"""Chroma."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject

from . import flux


def calls(config: Config) -> dict[str, Call]:
    # Its channels are those of a patch.
    seen = {**config, "in_channels": 16, "patch_size": 2}
    return {"text": flux.base(seen, 1, 11, 13), "batch 2": flux.base(seen, 2, 6, 10), "masked": flux.masked(seen)}


CONFIG = {name: value for name, value in flux.FLUX.items() if name != "guidance_embed"}
CONFIG |= {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": None}
CONFIG |= {"in_dim": 64, "out_dim": 80, "hidden_dim": 64, "n_layers": 2}
SMALL = (*flux.SMALL, "out_dim", "hidden_dim", "n_layers")

SUBJECTS = (Subject(kind="Chroma", config=CONFIG, small=SMALL, calls=calls),)
