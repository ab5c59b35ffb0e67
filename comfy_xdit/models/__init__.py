"""Model families, one short declarative file each, and how a checkpoint's family is found."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_xdit.errors import InputError
from comfy_xdit.models.base import Family
from comfy_xdit.models.flux import FLUX
from comfy_xdit.models.pixart import PIXART
from comfy_xdit.models.sd3 import SD3
from comfy_xdit.weights.header import FLOATS, TensorInfo
from comfy_xdit.weights.slices import Infos, fused

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX, SD3, PIXART)}

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""What stands before the transformer's keys; text encoders and VAE of an all-in-one file have others."""

SUPPORTED = "Flux.1, SD3, SD3.5 and PixArt, also in diffusers' layout, in fp32, fp16, bf16 or plain fp8"

QUANTISED = {
    "bitsandbytes": (".absmax", ".quant_map"),
    "SVDQuant (Nunchaku)": (".qweight", ".wscales"),
    "ComfyUI's quantised layout": (".comfy_quant",),
}
"""Layouts that we refuse, by keys that only they have."""

SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale")
"""Keys that fp8 layouts have beside their weights, and others too."""

OTHERS = {
    "Flux.2": "double_stream_modulation_img.lin.weight",
    "Chroma": "distilled_guidance_layer.in_proj.weight",
    "HunyuanVideo": "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "Wan": "blocks.0.cross_attn.norm_k.weight",
    "LTX-Video": "patchify_proj.weight",
    "Qwen-Image": "transformer_blocks.0.img_mod.1.weight",
    "Lumina or Z-Image": "cap_embedder.1.weight",
    "AuraFlow": "double_layers.0.attn.w1q.weight",
    "Stable Diffusion 1, 2 or XL": "input_blocks.0.0.weight",
}
"""Models that users also have, by one key each, so that a refusal can name them."""


def detect(infos: Mapping[str, TensorInfo], formats: Mapping[str, str] | None = None) -> tuple[Family, str]:
    """The family of a checkpoint's transformer, and the prefix of its keys.

    formats: what the file says of its quantised layers (`weights.quantised.layer_formats`).
    Raises InputError, naming what was found and what is supported, for every other file.
    """
    for prefix in PREFIXES:
        for family in FAMILIES.values():
            layouts = (family.keys, family.diffusers_keys)
            if any(all(prefix + key in infos for key in keys) for keys in layouts):
                own = {key: name for key, name in (formats or {}).items() if key.startswith(prefix)}
                _refuse_formats(family, own)
                _refuse_quantised(family, {k: i for k, i in infos.items() if k.startswith(prefix)})
                return family, prefix
    found = next(
        (name for name, key in OTHERS.items() if any(prefix + key in infos for prefix in PREFIXES)),
        f"no diffusion transformer that we know ({len(infos)} weights, first: {next(iter(infos), 'none')})",
    )
    raise InputError(f"this checkpoint holds {found}; supported are {SUPPORTED}")


def comfy_layout(family: Family, infos: Mapping[str, TensorInfo]) -> tuple[Infos, bool]:
    """The weights as ComfyUI names them, and whether the file itself has that layout (or diffusers').

    infos: keys without the prefix. Raises InputError when they are not the family's.
    """
    if all(key in infos for key in family.keys):
        return infos, True
    if all(key in infos for key in family.diffusers_keys):
        return fused(family.table(infos), infos), False
    missing = next(key for key in family.keys if key not in infos)
    raise InputError(f"this is no {family.title} checkpoint: it has no {missing}")


def listed(formats: Mapping[str, str]) -> str:
    """Layers and their formats, for a sentence: each format with its first layer and the number of the others."""
    layers: dict[str, list[str]] = {}
    for layer, name in formats.items():
        layers.setdefault(name, []).append(layer)
    return ", ".join(f"{found[0]}{_and_others(len(found) - 1, 'layer')} in {name}" for name, found in layers.items())


def _refuse_formats(family: Family, formats: Mapping[str, str]) -> None:
    """By what the file says itself: tensors are named alike in several formats."""
    if formats:
        raise InputError(f"this {family.title} checkpoint has {listed(formats)}; supported are {SUPPORTED}")


def _and_others(number: int, what: str) -> str:
    return f" and {number} other {what}{'s' if number > 1 else ''}" if number else ""


def _refuse_quantised(family: Family, infos: Mapping[str, TensorInfo]) -> None:
    """By the names of its tensors and their dtypes, where the file does not say what it is."""
    for layout, endings in QUANTISED.items():
        if any(key.endswith(endings) for key in infos):
            raise InputError(f"this {family.title} checkpoint is in {layout}; supported are {SUPPORTED}")
    odd = [key for key, info in infos.items() if info.dtype not in FLOATS and not key.endswith(SCALES)]
    if odd:
        raise InputError(
            f"this {family.title} checkpoint has {odd[0]}{_and_others(len(odd) - 1, 'weight')} "
            f"as {infos[odd[0]].dtype}; supported: {SUPPORTED}"
        )
    if any(key.endswith(SCALES) for key in infos):
        raise InputError(f"this {family.title} checkpoint is in scaled fp8; supported are {SUPPORTED}")
