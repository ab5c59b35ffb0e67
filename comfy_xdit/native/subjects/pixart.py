"""PixArt alpha and sigma."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, rand, times


def calls(config: Config) -> dict[str, Call]:
    def base(batch: int) -> Call:
        call = {"x": rand(batch, 4, 38, 42), "timestep": 1000 * times(0.7, 0.3)[:batch]}
        return {**call, "context": rand(batch, 9, config["caption_channels"])}

    sizes = {"c_size": times(80.0, 112.0).expand(2, 2), "c_ar": times(0.7).expand(2, 1)}
    return {"text": base(1), "batch 2": base(2), "with sizes": {**base(2), **sizes}}


CONFIG = {"image_model": "pixart_sigma", "input_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 120}
CONFIG |= {"depth": 2, "num_heads": 5, "caption_channels": 48, "model_max_length": 9, "pe_interpolation": 1}
CONFIG |= {"micro_condition": False}
SMALL = ("hidden_size", "depth", "num_heads", "caption_channels", "model_max_length", "input_size")

SUBJECTS = (
    Subject(kind="PixArtSigma", config=CONFIG, small=SMALL, calls=calls),
    Subject(
        kind="PixArtAlpha",
        config={**CONFIG, "image_model": "pixart_alpha", "micro_condition": True},
        small=SMALL,
        calls=calls,
    ),
)
