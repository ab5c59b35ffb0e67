"""A LoRA file as patches, for use without ComfyUI, whose own loader does this in its process.

Understood are the names that trainers give: kohya's ("lora_unet_…"), ComfyUI's own ("diffusion_model.…")
and diffusers' ("transformer.…", in diffusers' layout), each with its usual ending.
"""

from __future__ import annotations

from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Patch
from comfy_xdit.models import comfy_layout
from comfy_xdit.models.base import Family
from comfy_xdit.weights.slices import Infos, slice_map

ENDINGS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora.up.weight", ".lora.down.weight"),
)
"""What follows a layer's name: of the matrix next to the output, and of the one next to the input."""


class WeightRows(NamedTuple):
    """Rows of a weight in ComfyUI's layout; offset None is all of it."""

    key: str
    offset: list[int] | None = None


def read_lora(path: str, family: Family, infos: Infos, *, strength: float = 1.0) -> list[Patch]:
    """Patches for the model whose weights are `infos` (keys without prefix, either layout).

    Raises InputError when nothing in the file is for this model, or a layer lacks one of its matrices.
    """
    tensors = load_file(path)
    places = _places(family, infos)
    patches = []
    for name in tensors:
        for up, down in ENDINGS:
            if name.endswith(up) and name.removesuffix(up) in places:
                layer = name.removesuffix(up)
                if layer + down not in tensors:
                    raise InputError(f"{path}: {name} is there but no {layer + down}; the file is incomplete")
                place = places[layer]
                adapter = [
                    tensors[name],
                    tensors[layer + down],
                    _number(tensors.get(layer + ".alpha")),
                    tensors.get(layer + ".lora_mid.weight"),
                    tensors.get(layer + ".dora_scale"),
                    None,
                ]
                patches.append(
                    Patch(key=place.key, kind="lora", weights=adapter, strength=strength, offset=place.offset)
                )
    if not patches:
        first = next(iter(tensors), "nothing")
        raise InputError(f"{path} holds no LoRA for {family.title} (its first key: {first})")
    return patches


def _places(family: Family, infos: Infos) -> dict[str, WeightRows]:
    """Every name that a layer may have in a LoRA file → what it changes."""
    layout, _ = comfy_layout(family, infos)
    shapes: Infos = layout
    places: dict[str, WeightRows] = {}
    for key in layout:
        if key.endswith(".weight"):
            stem = key.removesuffix(".weight")
            for name in (stem, f"diffusion_model.{stem}", f"lora_unet_{stem.replace('.', '_')}"):
                places[name] = WeightRows(key)
    for target, pieces in slice_map(family.table(layout), layout).items():
        # One piece: halves that lie the other way round would need their matrix cut as well.
        if target.endswith(".weight") and len(pieces) == 1:
            piece, stem = pieces[0], target.removesuffix(".weight")
            whole = piece.rows == shapes[piece.source].shape[0]
            place = WeightRows(piece.source, None if whole else [0, piece.source_row, piece.rows])
            for name in (f"transformer.{stem}", f"lora_transformer_{stem.replace('.', '_')}"):
                places[name] = place
    return places


def _number(alpha: Tensor | None) -> float | None:
    return None if alpha is None else alpha.item()
