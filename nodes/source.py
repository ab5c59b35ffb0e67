"""Where the workers get a loaded MODEL's weights from: its own file, or a copy in shared memory."""

from __future__ import annotations

import os
from typing import Any

import comfy.model_base
import torch
from comfy_xdit_nodes.checkpoint import Checkpoint, open_checkpoint
from comfy_xdit_nodes.export import export
from comfy_xdit_nodes.patches import MODEL, file_key
from torch import Tensor

from comfy_xdit.models import listed
from comfy_xdit.weights.mapped import MappedFile
from comfy_xdit.weights.slices import is_unused

LOADERS = ("load_diffusion_model", "load_checkpoint_guess_config")
"""Functions of comfy.sd whose first argument is the file that a MODEL came from."""

NUM_PROBES = 8
"""Small weights compared with the file before it is taken for the MODEL's."""


def checkpoint_of(patcher: Any, owner: Any) -> Checkpoint:
    """The checkpoint with the unpatched weights of a loaded MODEL.

    Its own file where the MODEL says which and nothing contradicts it, else a copy in shared memory
    that lives as long as `owner`. Raises ValueError when the model can't run on a pool.
    """
    return _own_file(patcher) or export(owner, pristine(patcher) | _forgotten(patcher.model))


def pristine(patcher: Any) -> dict[str, Tensor]:
    """The transformer's weights as loaded, without the LoRA that ComfyUI may have merged into them.

    Key as in checkpoints → tensor; nothing is copied. Raises ValueError for quantised weights.
    """
    weights = {file_key(key): entries[0][0] for key, entries in patcher.get_key_patches(MODEL).items()}
    formats = {
        key.removesuffix(".weight"): format_of(patcher.model.diffusion_model, key, weight)
        for key, weight in weights.items()
        if type(weight) not in (Tensor, torch.nn.Parameter)
    }
    if formats:
        raise ValueError(f"this MODEL has {listed(formats)}; use fp32, fp16, bf16 or plain fp8 weights")
    return weights


def format_of(transformer: torch.nn.Module, key: str, weight: Any) -> str:
    """What ComfyUI calls the format of a quantised weight; else the class that another node made it of."""
    layer = transformer.get_submodule(key.rpartition(".")[0])
    return str(getattr(layer, "quant_format", None) or type(weight).__name__)


def _forgotten(model: Any) -> dict[str, Tensor]:
    """What a checkpoint says with weights that ComfyUI drops: PixArt's table of positions, whose size it looks at."""
    density = getattr(model.diffusion_model, "pe_interpolation", None)
    if not isinstance(model, comfy.model_base.PixArt) or density is None:
        return {}
    return {"pos_embed": torch.zeros(1, (32 * density) ** 2, 1)}


def _own_file(patcher: Any) -> Checkpoint | None:
    init = getattr(patcher, "cached_patcher_init", None)
    if not init or getattr(init[0], "__name__", "") not in LOADERS or init[0].__module__ != "comfy.sd":
        return None
    path = init[1][0]
    if not str(path).lower().endswith((".safetensors", ".sft")) or not os.path.isfile(path):
        return None
    checkpoint = open_checkpoint(path)
    return checkpoint if _same(checkpoint, pristine(patcher)) else None


def _same(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> bool:
    """Whether the file has these weights: all names and shapes, and the numbers of some small ones."""
    table = checkpoint.family.table(checkpoint.infos)
    # Under one spelling: ComfyUI's own ModelSave writes the names of its version.
    in_file = {file_key(key): key for key in checkpoint.infos if not is_unused(table, key)}
    if any(key not in weights or weights[key].shape != checkpoint.infos[own].shape for key, own in in_file.items()):
        return False
    small = sorted(weights, key=lambda key: (weights[key].numel(), key))[:NUM_PROBES]
    mapped = MappedFile(checkpoint.path)
    return all(
        torch.equal(
            mapped.tensor(checkpoint.prefix + in_file[key]).to(weights[key].dtype), weights[key].detach().cpu()
        )
        for key in small
        if key in in_file
    )
