"""Tiny GGUF files, and the node pack that loads them: of COMFYUI_GGUF, or of the checkout's custom_nodes."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import folder_paths
import torch

ARCHITECTURES = {"Flux": "flux", "WAN21_T2V": "wan", "QwenImage": "qwen_image"}
"""ComfyUI's class → what the pack's files call it."""


def folder():
    """Of the pack; None where there is none, or no Python package gguf."""
    checkout = Path(os.environ["COMFYUI_UNDER_TEST"]) / "custom_nodes" / "ComfyUI-GGUF"
    named = Path(os.environ.get("COMFYUI_GGUF", checkout))
    return named if (named / "nodes.py").is_file() and importlib.util.find_spec("gguf") else None


@functools.cache
def loaders():
    """The pack's nodes by name, imported as ComfyUI imports a pack."""
    name = str(folder()).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder() / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def write(name, kind, weights, forms):
    """A file among the diffusion models: the matrices of blocks in one form after the other, all else in fp32."""
    import gguf

    path = Path(folder_paths.get_folder_paths("diffusion_models")[-1]) / name
    writer, number = gguf.GGUFWriter(str(path), ARCHITECTURES[kind]), 0
    for key, weight in weights.items():
        array, form = weight.float().numpy(), "F32"
        if weight.ndim == 2 and "blocks" in key and key.endswith(".weight"):
            form = forms[number % len(forms)]
            number += 1
        dtype = gguf.GGMLQuantizationType[form]
        if form == "F16":
            array = weight.to(torch.float16).numpy()
        elif form != "F32":
            array = gguf.quants.quantize(array, dtype)
        writer.add_tensor(key, array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, **choices):
    """The MODEL of the pack's loader; choices: of its node with more inputs."""
    node = loaders()["UnetLoaderGGUFAdvanced" if choices else "UnetLoaderGGUF"]()
    return node.load_unet(path.name, **choices)[0]
