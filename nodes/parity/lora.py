"""How long it takes to switch a LoRA: ComfyUI's own way and the pool's, on the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy_xdit_bench.timing import ratio, take_turns
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models
from comfy_xdit_nodes.patcher import from_checkpoint

from comfy_xdit.messages import SetPatches
from comfy_xdit.pool.client import Pool

DEPTH, RANK = 12, 16


def switching(folder: Path, *, num_ranks: int, num_turns: int) -> dict[str, Any]:
    """Two LoRAs on every matrix of an SD3, put on in turn; `ratio` is ComfyUI's median over the pool's.

    ComfyUI merges into its one copy with this process's threads. The pool's time includes sending the LoRA to
    each rank; every rank merges with its own threads.
    """
    path = folder / "lora-bench.safetensors"
    models.write(path, models.sd3_config(depth=DEPTH), seed=5)
    stock, ours = models.load(path), from_checkpoint(open_checkpoint(str(path)))
    loras = [random_lora(stock, seed) for seed in (1, 2)]
    stocks = [comfy.sd.load_lora_for_models(stock, None, lora, 0.8, 0)[0] for lora in loras]
    patches = [
        comfy.sd.load_lora_for_models(ours, None, lora, 0.8, 0)[0].encoded_patches() for lora in loras
    ]
    pool = Pool.connect("lora", f"cpu:{num_ranks}")
    load = ours.load_message().model
    turn = {"stock": 0, "pool": 0}

    def switch_stock() -> None:
        turn["stock"] += 1
        comfy.model_management.load_models_gpu([stocks[turn["stock"] % 2]], force_full_load=True)

    def switch_pool() -> None:
        turn["pool"] += 1
        number = turn["pool"] % 2
        pool.call(SetPatches(model=load.model, patches_id=str(turn["pool"]), patches=patches[number]))

    with pool.lease():
        pool.call(load)
        times = take_turns({"ComfyUI": switch_stock, "pool": switch_pool}, num_turns=num_turns)
    pool.close()
    num_weights = sum(weight.numel() for weight in stock.model.diffusion_model.parameters())
    return {
        "compared": (
            f"a LoRA of rank {RANK} for another, on {len(patches[0])} weights of an SD3 with {num_weights / 1e6:.0f} M "
            f"parameters, fp32: ComfyUI with {torch.get_num_threads()} thread, a pool of {num_ranks} ranks"
        ),
        "rows": [{"what": name, **dataclasses.asdict(time)} for name, time in times.items()],
        "ratio": ratio(times["ComfyUI"], times["pool"]),
    }


def random_lora(patcher: Any, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA file's contents for every matrix in the model's blocks."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, weight in patcher.model.state_dict().items():
        if key.endswith(".weight") and weight.ndim == 2 and "joint_blocks" in key:
            name, (rows, columns) = key.removesuffix(".weight"), weight.shape
            weights[f"{name}.lora_up.weight"] = torch.randn(rows, RANK, generator=generator) * 0.05
            weights[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator) * 0.05
    return weights
