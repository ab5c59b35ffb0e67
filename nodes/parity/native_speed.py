"""How long a run takes on ComfyUI's own classes: its own, a pool of one rank, and pools of several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import comfy.supported_models
import safetensors.torch
import torch
from comfy_xdit_bench.timing import ratio, take_turns
from comfy_xdit_nodes.parity.measure import setting_of
from comfy_xdit_nodes.patcher import parallelize
from torch import Tensor

SIZES = {
    # As published but for width and depth; ComfyUI reads 128 channels a head.
    "wan": (
        "WAN21_T2V",
        {
            **{"image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16},
            **{"dim": 512, "ffn_dim": 1024, "num_layers": 2, "num_heads": 4, "freq_dim": 256, "text_dim": 4096},
            **{"text_len": 512, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "window_size": (-1, -1)},
        },
        4096,
    ),
    "qwen-image": (
        "QwenImage",
        {
            **{"image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2},
            **{"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
            **{"axes_dims_rope": (16, 56, 56)},
        },
        3584,
    ),
}
"""Family → ComfyUI's class, the transformer's configuration, and the text's channels."""

NUM_STEPS, NUM_TEXT = 2, 64


def speed(folder: Path, family: str, *, tokens: int, degrees: list[dict[str, int]], num_turns: int) -> dict[str, Any]:
    """Runs of two steps without guidance, in turn, each process with one thread.

    tokens: of the picture or video, a square number (times four frames for Wan). degrees: of each pool beside that of
    one rank. `ratio` is the pool of one rank over ComfyUI's own run, medians; each row has its own against that run.
    """
    kind = SIZES[family][0]
    model = model_of(folder, family)
    frames = 4 if family == "wan" else 1
    side = 2 * round((tokens / frames) ** 0.5)
    shape = (1, 16, frames, side, side)
    settings = {"a pool of 1 rank": setting_of(1)}
    for chosen in degrees:
        spec = " x ".join(f"{axis}={degree}" for axis, degree in chosen.items())
        settings[spec] = setting_of(torch.tensor(list(chosen.values())).prod().item(), **chosen)
    runs = {name: parallelize(model, setting) for name, setting in settings.items()}
    outputs: dict[str, Tensor] = {}

    def run(name: str, patcher: Any) -> None:
        outputs[name] = run_steps(patcher, family, shape)

    contestants = {name: (lambda name=name, patcher=patcher: run(name, patcher)) for name, patcher in runs.items()}
    times = take_turns({"ComfyUI": lambda: run("ComfyUI", model), **contestants}, num_turns=num_turns)
    stock = outputs["ComfyUI"]
    num_weights = sum(weight.numel() for weight in model.model.diffusion_model.parameters())
    return {
        "compared": (
            f"{NUM_STEPS} steps of a {kind} with {num_weights / 1e6:.0f} M parameters in fp32, "
            f"{frames * (side // 2) ** 2} tokens and {NUM_TEXT} of text, batch 1; one thread a process"
        ),
        "rows": [
            {
                "what": name,
                **dataclasses.asdict(time),
                "times_comfyui": ratio(times["ComfyUI"], time),
                "relative_difference": ((outputs[name] - stock).abs().max() / stock.abs().max()).item(),
            }
            for name, time in times.items()
        ],
        "ratio": ratio(times["a pool of 1 rank"], times["ComfyUI"]),
    }


def model_of(folder: Path, family: str) -> Any:
    """The MODEL of `SIZES`, by the stock loader, from a file that is written to `folder`; random weights in fp32."""
    kind, config, _ = SIZES[family]
    path = folder / f"{family}.safetensors"
    made = getattr(comfy.supported_models, kind)(dict(config))
    made.set_inference_dtype(torch.float32, None)
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for key, old in made.get_model({}, "").diffusion_model.state_dict().items():
        size = 0.5 / old[0].numel() ** 0.5 if old.ndim >= 2 else 0.02
        weights[key] = torch.randn(old.shape, generator=generator) * size + (old.ndim < 2 and not key.endswith("bias"))
    safetensors.torch.save_file(weights, path)
    return comfy.sd.load_diffusion_model(str(path))


def run_steps(model: Any, family: str, shape: tuple[int, ...]) -> Tensor:
    """The latent after `NUM_STEPS` of euler, without guidance, from noise of `shape`."""
    channels = SIZES[family][2]
    generator = torch.Generator().manual_seed(1)
    text = [[torch.randn((1, NUM_TEXT, channels), generator=generator), {}]]
    noise = torch.randn(shape, generator=generator)
    latent = torch.zeros(shape)
    return comfy.sample.sample(
        model, noise, NUM_STEPS, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=1
    )
