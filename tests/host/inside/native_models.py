"""Tiny random checkpoints for ComfyUI's own loaders: families, and formats in ComfyUI's own layouts."""

import json

import comfy.sd
import comfy.supported_models
import safetensors.torch
import torch
from comfy_xdit_nodes.parity import models as tiny

FP8 = torch.float8_e4m3fn
DIFFUSERS = ("Flux", "FluxInpaint", "FluxSchnell", "SD3", "PixArtAlpha", "PixArtSigma")
"""Kinds that diffusers has classes for too."""


def weights(config, dtype=torch.bfloat16, seed=3):
    """Random weights of the model of `config`, which every layer makes count."""
    generator = torch.Generator().manual_seed(seed)
    config.set_inference_dtype(dtype, None)
    found = {}
    for key, old in config.get_model({}, "").diffusion_model.state_dict().items():
        value = torch.randn(old.shape, generator=generator)
        value = value * 0.5 / value[0].numel() ** 0.5 if value.ndim >= 2 else 0.02 * value + (not key.endswith("bias"))
        found[key] = value.to(dtype).contiguous()
    return found


IN_BLOCKS = ("blocks", "layers.", "refiner.")
"""One of these is in the names of the weights of blocks."""


def is_matrix(key, weight):
    return key.endswith(".weight") and weight.ndim == 2 and any(part in key for part in IN_BLOCKS)


def scaled_fp8(plain):
    """The older layout: a marker, and a scale for each matrix."""
    found = {"scaled_fp8": torch.empty(0, dtype=FP8)}
    for key, weight in plain.items():
        found[key] = weight
        if is_matrix(key, weight):
            scale = weight.abs().max().float() / 448
            found[key] = (weight.float() / scale).to(FP8)
            found[key.removesuffix("weight") + "scale_weight"] = scale
    return found


def quantised(plain, formats):
    """The matrices of blocks in ComfyUI's layouts, one format after the other; None leaves one as it is."""
    found, number = {}, 0
    for key, weight in plain.items():
        form = None
        if is_matrix(key, weight):
            form = formats[number % len(formats)]
            number += 1
        found |= {key: weight} if form is None else _quantised(key, weight, form)
    return found


def _quantised(key, weight, form):
    import comfy.quant_ops as ops

    base, note = key.removesuffix("weight"), {"format": form}
    if form == "int8_tensorwise":
        rotation = {"convrot": True, "convrot_groupsize": 64}
        numbers, params = ops.TensorWiseINT8Layout.quantize(weight, is_weight=True, per_channel=True, **rotation)
        note |= rotation
    elif form == "nvfp4":
        numbers, params = ops.TensorCoreNVFP4Layout.quantize(weight)
    elif form == "mxfp8":
        numbers, params = ops.TensorCoreMXFP8Layout.quantize(weight)
    else:
        numbers, params = ops.TensorCoreFP8E4M3Layout.quantize(weight, scale="recalculate")
    scale = params.block_scale if form == "nvfp4" else params.scale
    if scale.dtype == getattr(torch, "float8_e8m0fnu", None):
        scale = scale.view(torch.uint8)
    found = {key: numbers, base + "weight_scale": scale}
    if form == "nvfp4":
        found[base + "weight_scale_2"] = params.scale
    return found | {base + "comfy_quant": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)}


def flux(form):
    """The state dict of a tiny Flux.1 in one format."""
    plain = weights(tiny.flux_config())
    if form in ("fp32", "fp16"):
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[form]
        return {key: value.to(dtype) for key, value in plain.items()}
    if form == "fp8":
        return {key: value.to(FP8) if value.ndim == 2 else value for key, value in plain.items()}
    if form == "all in one":
        beside = {"first_stage_model.x": torch.zeros(8), "cond_stage_model.y": torch.zeros(8)}
        return {f"model.diffusion_model.{key}": value for key, value in plain.items()} | beside
    if form == "scaled fp8":
        return scaled_fp8(plain)
    if form == "mixed":
        return quantised(plain, ["float8_e4m3fn", "int8_tensorwise", "nvfp4", None])
    return plain if form == "bf16" else quantised(plain, [form])


FLUX_FORMS = (
    *("bf16", "fp16", "fp32", "fp8", "scaled fp8", "all in one"),
    *("float8_e4m3fn", "int8_tensorwise", "nvfp4", "mxfp8", "mixed"),
)


def qwen():
    sizes = {"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 128}
    sizes |= {"num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56)}
    return comfy.supported_models.QwenImage({"image_model": "qwen_image", **sizes})


def wan(kind="WAN21_T2V", **more):
    sizes = {"model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16, "dim": 256, "ffn_dim": 256}
    sizes |= {"num_layers": 2, "num_heads": 2, "freq_dim": 256, "text_dim": 4096, "text_len": 512}
    sizes |= {"qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "window_size": (-1, -1)}
    return getattr(comfy.supported_models, kind)({"image_model": "wan2.1", **sizes, **more})


def krea2():
    sizes = {"features": 256, "channels": 16, "patch": 2, "layers": 3, "heads": 2, "kvheads": 1}
    return comfy.supported_models.Krea2({"image_model": "krea2", **sizes, "txtlayers": 2, "txtdim": 80})


def flux2():
    sizes = {"in_channels": 128, "out_channels": 128, "patch_size": 1, "hidden_size": 256, "num_heads": 2, "depth": 2}
    sizes |= {"depth_single_blocks": 2, "context_in_dim": 96, "vec_in_dim": None, "mlp_ratio": 3.0}
    sizes |= {"axes_dim": [32, 32, 32, 32], "txt_ids_dims": [3], "theta": 2000, "guidance_embed": True}
    sizes |= {"qkv_bias": False, "ops_bias": False, "global_modulation": True, "mlp_silu_act": True}
    return comfy.supported_models.Flux2({"image_model": "flux2", **sizes, "default_ref_method": "index"})


def save(path, state):
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def loaded_once(cases, tmp_path_factory):
    """name → the MODEL of a case, by the stock loader from a file of its weights, and the latent that ComfyUI makes."""
    made = {}

    def get(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name) / f"{name}.safetensors"
            model = comfy.sd.load_diffusion_model(str(save(path, cases[name].weights())))
            made[name] = model, cases[name].run(model)
        return made[name]

    return get
