"""Tiny random files in place of those that the bundled workflows name, and the changes that go with them."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import torch
from comfy_xdit_bench.vae_checkpoint import random_vae
from safetensors.torch import save_file
from torch import Tensor

from comfy_xdit.vae import VAEConfig

TESTS = Path(__file__).resolve().parents[1]
TINY = runpy.run_path(str(TESTS / "tiny.py"))

CONTEXT, POOLED = 4096, 2048
"""What ComfyUI's SD3 text encoder gives when it has CLIP-L alone."""

STOCK = {
    "XDiTLoadDiffusionModel": "UNETLoader",
    "XDiTKSampler": "KSampler",
    "XDiTVAEDecode": "VAEDecode",
}
"""Our node → the stock node of the same inputs."""


def clip_l(seed: int = 0) -> dict[str, Tensor]:
    """CLIP-L with random weights: ComfyUI knows it by its shapes, so it cannot be smaller."""
    width, layers = 768, 12
    shapes = {"text_model.embeddings.token_embedding.weight": (49408, width)}
    shapes["text_model.embeddings.position_embedding.weight"] = (77, width)
    for layer in range(layers):
        block = f"text_model.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{block}.self_attn.{part}.weight"] = (width, width)
        shapes |= {
            f"{block}.mlp.fc1.weight": (4 * width, width),
            f"{block}.mlp.fc2.weight": (width, 4 * width),
        }
        shapes |= {f"{block}.mlp.fc1.bias": (4 * width,)}
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc2",
        ):
            shapes[f"{block}.{part}.bias"] = (width,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    shapes |= {f"text_model.final_layer_norm.{part}": (width,) for part in ("weight", "bias")}
    shapes["text_projection.weight"] = (width, width)
    return TINY["random_weights"](shapes, seed, torch.float16)


def lora(weights: dict[str, Tensor], rank: int = 4) -> dict[str, Tensor]:
    """A LoRA on the attention of every block of a transformer with these weights."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for key, base in weights.items():
        if key.endswith(("attn.qkv.weight", "linear1.weight")):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            found[f"{name}.lora_A.weight"] = torch.randn(rank, base.shape[1], generator=generator)
            found[f"{name}.lora_B.weight"] = 0.05 * torch.randn(base.shape[0], rank, generator=generator)
    return found


def write(models: Path, *, small_flux: bool) -> None:
    """All the files that the workflows name, except the text encoders that `tiny` does without.

    small_flux: whether the host's own loader takes a Flux of another size than the published one; where it
    does not, an SD3 stands in Flux's place.
    """
    sd3 = TINY["random_weights"](
        TINY["sd3_shapes"](heads=4, depth=4, context=CONTEXT, vec=POOLED, channels=16, side=32), 1
    )
    flux_shapes = TINY["flux_shapes"](head_dim=128, context=CONTEXT, vec=768, channels=64, out_channels=64)
    flux = TINY["random_weights"](flux_shapes, 2) if small_flux else sd3
    config = VAEConfig(
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        quant_conv=False,
        post_quant_conv=False,
        attention=True,
    )
    vae = {key: value.half() for key, value in random_vae(config).items()}
    save_file(clip_l(), models / "text_encoders" / "clip_l.safetensors")
    save_file(vae, models / "vae" / "ae.safetensors")
    save_file(flux, models / "diffusion_models" / "flux1-dev.safetensors")
    save_file(lora(flux), models / "loras" / "Hyper-FLUX.1-dev-8steps-lora.safetensors")
    whole = {f"model.diffusion_model.{key}": value for key, value in sd3.items()}
    whole |= {f"first_stage_model.{key}": value for key, value in vae.items()}
    save_file(whole, models / "checkpoints" / "sd3.5_medium.safetensors")


def tiny(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with one text encoder, a small image and few steps; a LoRA at a strength that shows."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] in ("DualCLIPLoader", "TripleCLIPLoader"):
            node["class_type"] = "CLIPLoader"
            node["inputs"] = {"clip_name": "clip_l.safetensors", "type": "sd3"}
        if node["class_type"] == "EmptySD3LatentImage":
            inputs |= {"width": 112, "height": 80}
        if "steps" in inputs:
            inputs["steps"] = 3
        if "strength_model" in inputs:
            inputs["strength_model"] = 1.0
    return prompt


def stock(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt without any of our nodes."""
    prompt = copy.deepcopy(prompt)
    parallel = {number: node for number, node in prompt.items() if node["class_type"] == "XDiTParallelModel"}
    removed = set(parallel) | {
        number for number, node in prompt.items() if node["class_type"] == "XDiTWorkerPool"
    }
    for number in removed:
        del prompt[number]
    for node in prompt.values():
        node["class_type"] = STOCK.get(node["class_type"], node["class_type"])
        node["inputs"].pop("pool", None)
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in parallel:
                node["inputs"][name] = parallel[value[0]]["inputs"]["model"]
    return prompt
