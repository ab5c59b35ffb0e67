"""Tiny models with random weights, in ComfyUI's layout, made with ComfyUI's own classes."""

from pathlib import Path

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import safetensors.torch
import torch
from comfy.model_management import get_torch_device
from comfy_xdit_nodes import skeleton
from comfy_xdit_nodes.checkpoint import open_checkpoint

CONTEXT, POOLED, HEAD = 64, 48, 128


def sd3_config(depth=4, dual=()):
    return comfy.supported_models.SD3(
        {
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "depth": depth,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": CONTEXT, "out_features": 64 * depth},
            },
            "num_patches": 1024,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": list(dual),
            **({"qk_norm": "rms"} if dual else {}),
        }
    )


def flux_config(guidance=True):
    kind = comfy.supported_models.Flux if guidance else comfy.supported_models.FluxSchnell
    config = {
        "image_model": "flux",
        "in_channels": 16,
        "patch_size": 2,
        "out_channels": 16,
        "vec_in_dim": POOLED,
        "context_in_dim": CONTEXT,
        "hidden_size": 2 * HEAD,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": guidance,
    }
    if hasattr(comfy.ldm.flux.model.FluxParams, "__dataclass_fields__"):
        fields = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
        extra = {"txt_ids_dims": [], "yak_mlp": False, "txt_norm": False}
        config.update({name: value for name, value in extra.items() if name in fields})
    return kind(config)


def pixart_config(alpha=False):
    kind = comfy.supported_models.PixArtAlpha if alpha else comfy.supported_models.PixArtSigma
    return kind(
        {
            "image_model": "pixart_alpha" if alpha else "pixart_sigma",
            "num_heads": 2,
            "patch_size": 2,
            "hidden_size": 144,
            "in_channels": 4,
            "depth": 3,
            "caption_channels": CONTEXT,
            "model_max_length": 30,
            "micro_condition": alpha,
        }
    )


def write(path, config, *, seed, prefix="", dtype=torch.float32, beside=None):
    """Random weights at a scale at which every layer changes the result, none of them explodes it.

    beside: key → shape of what files have and ComfyUI forgets.
    """
    generator = torch.Generator().manual_seed(seed)
    config.set_inference_dtype(torch.float32, None)
    weights = {prefix + key: torch.randn(shape, generator=generator) for key, shape in (beside or {}).items()}
    for key, shape in config.get_model({}, "").diffusion_model.state_dict().items():
        value = torch.randn(shape.shape, generator=generator)
        if value.ndim >= 2:
            value *= 0.7 / value[0].numel() ** 0.5
        elif key.endswith("bias"):
            value *= 0.02
        else:
            value = 1 + 0.02 * value
        if key.endswith("_norm.weight"):
            key = key.removesuffix("weight") + "scale"
        weights[prefix + key] = value.to(dtype).contiguous()
    safetensors.torch.save_file(weights, path)


def write_all(folder: Path):
    write(folder / "sd3.safetensors", sd3_config(), seed=1)
    write(folder / "sd35.safetensors", sd3_config(dual=(0, 1)), seed=2, prefix="model.diffusion_model.")
    write(folder / "flux.safetensors", flux_config(), seed=3)
    write(folder / "schnell.safetensors", flux_config(guidance=False), seed=4)
    # Its table of positions says that it is for 1024 pixels.
    write(folder / "pixart.safetensors", pixart_config(), seed=5, beside={"pos_embed": (1, 64 * 64, 144)})
    write(folder / "alpha.safetensors", pixart_config(alpha=True), seed=6, prefix="model.diffusion_model.")


def load(path, storage=None, compute=None):
    """ComfyUI's own model with its weights. Not its loader: 0.3.64's knows no Flux of this size."""
    checkpoint = open_checkpoint(str(path))
    config = skeleton.config_from_header(checkpoint, dtype=storage)
    if compute is not None:
        config.set_inference_dtype(storage, compute if compute != storage else None)
    weights = safetensors.torch.load_file(path)
    weights = {key.removeprefix(checkpoint.prefix): value for key, value in weights.items()}
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    return comfy.model_patcher.ModelPatcher(model, get_torch_device(), torch.device("cpu"))


def from_file(patcher, path):
    """The MODEL, with the note that newer versions of ComfyUI leave on what their loaders give."""
    patcher.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(path),))
    return patcher


def conditioning(tokens=20, seed=10, **extra):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, POOLED, generator=generator)
    return [[torch.randn(1, tokens, CONTEXT, generator=generator), {"pooled_output": pooled, **extra}]]


def latent(height=16, width=16, batch=1, *, kind="sd3"):
    """An empty latent; PixArt's are wider, since it has no positions for small pictures."""
    if kind in ("pixart", "alpha"):
        return {"samples": torch.zeros(batch, 4, height, max(width, 68 - height))}
    return {"samples": torch.zeros(batch, 16, height, width)}


def fitted(kind, inputs):
    """Inputs of a node that suit SD3 and Flux, for this kind: latents as `latent` says, and half of the noise.

    PixArt's sigmas begin at 157, and random weights don't take the noise away: what they do would hardly show.
    """
    if kind not in ("pixart", "alpha"):
        return inputs
    given = inputs.get("latent_image") or latent()
    batch, _, height, width = given["samples"].shape
    size = latent(height, width, batch, kind=kind)["samples"].shape[2:]
    wide = {name: torch.nn.functional.interpolate(value, size=size) for name, value in given.items()}
    wide["samples"] = wide["samples"][:, :4]
    return {**inputs, "latent_image": wide, "denoise": min(inputs.get("denoise", 1.0), 0.5)}


def kind_of(model):
    """A name for the family of a MODEL."""
    return "pixart" if isinstance(model.model, comfy.model_base.PixArt) else "sd3"


def sample(model, *, node=None, **changes):
    """The latent of one run of the stock KSampler, or of `node`."""
    import nodes

    inputs = {
        "seed": 7,
        "steps": 3,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": conditioning(seed=10),
        "negative": conditioning(seed=11),
        "latent_image": latent(kind=kind_of(model)),
        "denoise": 1.0,
        **changes,
    }
    return (node or nodes.KSampler()).sample(model=model, **inputs)[0]["samples"]
