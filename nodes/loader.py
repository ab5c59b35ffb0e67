"""The stock diffusion model loader, without the weights."""

from __future__ import annotations

from typing import Any

import folder_paths
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint, version_of
from comfy_xdit_nodes.native.header import open_header
from comfy_xdit_nodes.patcher import from_checkpoint, from_header
from comfy_xdit_nodes.pool import CATEGORY

WEIGHT_DTYPES = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class XDiTLoadDiffusionModel:
    """A MODEL from a file's header: the workers read the weights themselves."""

    DESCRIPTION = (
        "Loads a diffusion model for the pool: this process reads the file's header only, the workers "
        "map the weights. Takes every model that the pool runs as safetensors, quantised or not, also inside an "
        "all-in-one checkpoint."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model, its weights on the pool.",)
    FUNCTION = "load_unet"
    SEARCH_ALIASES = ("xdit", "unet", "load model", "multi gpu")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = folder_paths.get_filename_list("diffusion_models")
        name = {"tooltip": "A safetensors file from models/diffusion_models."}
        dtype = {
            "tooltip": "What the workers keep the weights in; quantised ones stay as they are. fp8 takes half the "
            "memory of bf16; 'fast' asks for fp8 sums too, which PixArt, and ComfyUI before 0.29.0, do in bf16 or fp16."
        }
        return {"required": {"unet_name": (names, name), "weight_dtype": (list(WEIGHT_DTYPES), dtype)}}

    @classmethod
    def IS_CHANGED(cls, unet_name: str, **_: Any) -> str:
        return version_of(folder_paths.get_full_path("diffusion_models", unet_name))

    def load_unet(self, unet_name: str, weight_dtype: str) -> tuple[Any]:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        dtype = WEIGHT_DTYPES[weight_dtype]
        if (found := open_header(path, dtype=dtype, fp8=weight_dtype == "fp8_e4m3fn_fast")) is not None:
            return (from_header(*found),)
        return (from_checkpoint(open_checkpoint(path), dtype=dtype),)
