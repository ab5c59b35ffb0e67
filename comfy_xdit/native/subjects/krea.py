"""Krea 2."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, rand, times


def calls(config: Config) -> dict[str, Call]:
    text = config["txtlayers"] * config["txtdim"]
    one = {"x": rand(1, 16, 11, 13), "timestep": times(0.7), "context": rand(1, 9, text)}
    two = {"x": rand(2, 16, 11, 13), "timestep": times(0.7, 0.3), "context": rand(2, 9, text)}
    references = {"ref_latents": [rand(1, 16, 6, 8), rand(1, 16, 1, 4, 6)]}
    found: dict[str, Call] = {"text": one, "batch 2": two, "frames": {**one, "x": rand(1, 16, 1, 6, 8)}}
    for method in ("index", "index_timestep_zero"):
        found[f"references by {method}"] = {**one, **references, "ref_latents_method": method}
    found["batch 2, references"] = {**two, **references, "ref_latents_method": "index_timestep_zero"}
    return found


CONFIG = {"image_model": "krea2", "features": 160, "channels": 16, "patch": 2, "layers": 2, "heads": 10, "kvheads": 2}
CONFIG |= {"txtlayers": 2, "txtdim": 48, "tdim": 32, "txtheads": 4, "txtkvheads": 4}
SMALL = ("features", "layers", "heads", "kvheads", "txtlayers", "txtdim", "tdim", "txtheads", "txtkvheads")

SUBJECTS = (Subject(kind="Krea2", config=CONFIG, small=SMALL, calls=calls),)
