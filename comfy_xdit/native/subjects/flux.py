"""Flux.1, LongCat-Image and Flux.2."""

from __future__ import annotations

from comfy_xdit.native.subject import OFF, Call, Config, Subject, rand, times

ROPE = {"rope_options": {"scale_x": 1.5, "scale_y": 0.5, "shift_t": 1.0, "shift_x": 3.0}}


def base(config: Config, batch: int, height: int, width: int) -> Call:
    """A call without references; what the configuration has no use for is given all the same."""
    channels, text = config["in_channels"], config["context_in_dim"]
    return {
        "x": rand(batch, channels, height, width),
        "timestep": times(0.7, 0.3)[:batch],
        "context": rand(batch, 9, text),
        "y": rand(batch, config["vec_in_dim"] or 8),
        "guidance": times(3.5, 2.0)[:batch],
    }


def masked(config: Config) -> Call:
    """A call with a mask of text and image, as of regional prompts."""
    patch = config["patch_size"]
    call, num = base(config, 1, 11, 13), 9 + -(-11 // patch) * -(-13 // patch)
    mask = OFF * (rand(1, num, num) > 1).float()
    return {**call, "attention_mask": mask.index_fill(2, mask.new_tensor([0]).long(), 0)}


def with_references(config: Config) -> dict[str, Call]:
    channels = config["out_channels"]
    one = base(config, 1, 11, 13)
    if one["x"].shape[1] != channels:
        return {}
    found = {}
    methods = ["offset", "index", "uxo"]
    # Flux.1's own code can't do it.
    methods += ["index_timestep_zero"] * bool(config.get("global_modulation"))
    for method in methods:
        references = [rand(1, channels, 8, 9), rand(1, channels, 5, 4)]
        found[f"references by {method}"] = {**one, "ref_latents": references, "ref_latents_method": method}
    two = base(config, 2, 6, 10)
    found["batch 2, a reference"] = {**two, "ref_latents": [rand(2, channels, 4, 6)]}
    return found


def calls(config: Config) -> dict[str, Call]:
    one = base(config, 1, 11, 13)
    return {
        "text": one,
        "batch 2": base(config, 2, 6, 10),
        "a scaled rope": {**one, "transformer_options": ROPE},
        "masked": masked(config),
        **with_references(config),
    }


SIZES = {"hidden_size": 80, "num_heads": 5, "depth": 2, "depth_single_blocks": 2, "context_in_dim": 48}
SMALL = (*SIZES, "axes_dim")
FLUX: Config = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, **SIZES}
FLUX |= {"vec_in_dim": 32, "mlp_ratio": 4.0, "axes_dim": [4, 6, 6], "txt_ids_dims": [], "theta": 10000}
FLUX |= {"qkv_bias": True, "guidance_embed": True}
FLUX2: Config = {"image_model": "flux2", "in_channels": 16, "out_channels": 16, "patch_size": 1, **SIZES}
FLUX2 |= {"vec_in_dim": None, "mlp_ratio": 3.0, "axes_dim": [4, 4, 4, 4], "txt_ids_dims": [3], "theta": 2000}
FLUX2 |= {"guidance_embed": True, "qkv_bias": False, "global_modulation": True, "mlp_silu_act": True}
FLUX2 |= {"ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0}


def flux1(kind: str, **config: object) -> Subject:
    return Subject(kind=kind, config={**FLUX, **config}, small=SMALL, calls=calls)


FLUX1_SUBJECTS = (
    flux1("Flux"),
    flux1("FluxInpaint", in_channels=96),
    flux1("FluxSchnell", guidance_embed=False),
    flux1("LongCatImage", guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]),
)
FLUX2_SUBJECTS = (
    Subject(kind="Flux2", config=FLUX2, small=SMALL, calls=calls),
    Subject(kind="Flux2", config={**FLUX2, "guidance_embed": False}, small=SMALL, calls=calls),
)
