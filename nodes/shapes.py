"""Latents and conditioning that were made for another model, refused before a worker is touched.

A family's own translation of a call is tried on tensors that have a shape and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_xdit_nodes.checkpoint import Checkpoint
from comfy_xdit_nodes.native.checkpoint import ComfyCheckpoint
from comfy_xdit_nodes.refuse import Conds
from torch import Tensor


def refuse_shapes(checkpoint: Checkpoint | ComfyCheckpoint, noise: Tensor, conds: Conds) -> None:
    """Raise ValueError when the model can't take the run's latent or its conditioning.

    noise: of the latent's shape; conds: as the guider was given them.
    """
    title = checkpoint.shape.title
    if isinstance(checkpoint, ComfyCheckpoint):
        is_packed = noise.ndim == 3 and noise.shape[1] == 1
        if min(noise.shape) < 1 or not (is_packed or noise.ndim == checkpoint.num_dims):
            raise ValueError(
                f"a latent of shape {list(noise.shape)} can't be sampled with {title}, whose latents have "
                f"{checkpoint.num_dims} dims; use the empty latent node and the VAE that belong to the model"
            )
        return
    shape = "of several parts" if noise.is_nested else f"of shape {list(noise.shape)}"
    if noise.is_nested or noise.ndim != 4 or min(noise.shape) < 1:
        raise ValueError(
            f"a latent {shape} can't be sampled with {title}, which takes [batch, channels, height, width]; "
            "use the empty latent node and the VAE that belong to the model"
        )
    for name, entries in conds.items():
        for entry in entries or ():
            if isinstance(entry.get("cross_attn"), Tensor):
                _refuse_entry(checkpoint, noise, f"the {name} conditioning", entry)


def _refuse_entry(checkpoint: Checkpoint, noise: Tensor, what: str, entry: dict[str, Any]) -> None:
    title, config = checkpoint.shape.title, checkpoint.config
    context, pooled = entry["cross_attn"], entry.get("pooled_output")
    if context.ndim != 3 or min(context.shape) < 1:
        raise ValueError(
            f"{what} has text of shape {list(context.shape)}, and {title} takes [batch, tokens, channels]; "
            "encode the prompt with the text encoders that belong to the model"
        )
    wanted = config.get("pooled_projection_dim")
    # Of a longer one Flux takes the beginning; the others' text encoders give what fits.
    if pooled is not None and wanted is not None and (pooled.ndim != 2 or pooled.shape[1] < wanted):
        raise ValueError(
            f"{what} has pooled text of shape {list(pooled.shape)}, and {title} takes [batch, {wanted}]; "
            "encode the prompt with the text encoders that belong to the model"
        )
    call = {
        "x": _shape(noise),
        "timestep": torch.empty(1, device="meta"),
        "context": _shape(context),
        "y": None if pooled is None else _shape(pooled),
        "guidance": None if entry.get("guidance", 1.0) is None else torch.empty(1, device="meta"),
        "ref_latents": [_shape(reference) for reference in entry.get("reference_latents") or []],
        "ref_latents_method": entry.get("reference_latents_method"),
    }
    checkpoint.family.inputs(config, {name: value for name, value in call.items() if value is not None})


def _shape(whole: Tensor) -> Tensor:
    """One row of it, without its numbers: how rows go together is ComfyUI's business."""
    return torch.empty((1, *whole.shape[1:]), device="meta")
