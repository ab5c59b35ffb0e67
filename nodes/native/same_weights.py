"""Whether a file has the weights of a loaded MODEL, without reading much of either.

Names, shapes and formats are compared for all weights, numbers in full for what has one dim (norms, biases, scales) and
is small, and in a sparse sample of every other: a merge, a scale, a LoRA or another finetune changes nearly every
number of a weight that it touches, and a sample costs a few pages of the disk a weight. What escapes is a change of a
few rows in the middle of a large weight; and the numbers of large weights that ComfyUI computes from the file's, as it
joins those of diffusers' layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from comfy_xdit_nodes.patches import MODEL
from safetensors import SafetensorError
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import ComfySource
from comfy_xdit.native.load import configured, read

NUM_ROWS = 4
"""Of a large weight: the first, the last, and between, so that each of three matrices fused into one is met."""

NUM_TOGETHER = 64
"""Numbers at the start, in the middle and at the end of such a row."""

SMALL = 4096
"""Weights with no more numbers are compared in full."""

UNSAID = {
    "full_precision_matrix_mult": False,
    **{"convrot": False, "convrot_groupsize": 256, "group_size": 16, "linear_dtype": "int4"},
}
"""What ComfyUI takes for said where the note on a quantised layer doesn't say it."""


def why_not_of(path: str, source: ComfySource, patcher: Any) -> str | None:
    """What tells the file's weights from the unpatched ones of a MODEL; None where nothing does.

    source: how ComfyUI made the MODEL from its file.
    """
    try:
        in_file = named_by_comfyui(*read(path), source)
    except InputError as error:
        return str(error)
    except (OSError, SafetensorError):
        return "it is no whole safetensors file"
    net = patcher.model.diffusion_model
    state = pristine(patcher)
    for key in unknown(state):
        return f"its {key} is a {type(state[key]).__name__}"
    own_buffers = {name for name, _ in net.named_buffers()}
    for key, weight in state.items():
        if key in in_file:
            if not is_same(key, in_file[key], weight):
                return f"{key} is another one"
        elif key not in own_buffers:
            return f"it has no {key}"
    return None


def pristine(patcher: Any) -> dict[str, Tensor]:
    """The transformer's state dict as it was loaded, without the LoRA that ComfyUI may have merged into it.

    Nothing is copied. A quantised weight is several entries, as in ComfyUI's files.
    """
    state = dict(patcher.model.diffusion_model.state_dict())
    merged = {key: kept.weight for key, kept in patcher.backup.items()}
    merged |= {key: kept[0] for key, kept in patcher.hook_backup.items()}
    for name, weight in merged.items():
        key = name.removeprefix(MODEL)
        if name.startswith(MODEL) and key in state:
            is_plain = not hasattr(weight, "__tensor_flatten__")
            state |= {key: weight} if is_plain else weight.state_dict(key)
    return state


def unknown(state: dict[str, Tensor]) -> list[str]:
    """Names of weights of a state dict that are of another node's making: neither plain numbers nor ComfyUI's."""
    return [key for key, weight in state.items() if type(weight) not in (Tensor, torch.nn.Parameter)]


def named_by_comfyui(
    views: dict[str, Tensor], metadata: Any, source: ComfySource
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Name in the transformer → (shape and dtype, numbers); no numbers for what is computed of large weights.

    views, metadata: what a file has. ComfyUI's own conversions are run, on stand-ins for all that has more than one
    dim: they may join weights, or write to them. Raises InputError when ComfyUI finds another model in it.
    """
    # In inference mode tensors don't count the writes to them.
    with torch.inference_mode(False), torch.no_grad():
        given = stand_ins(views)
        origins = {id(value): (views[key], value._version) for key, value in given.items()}
        # `configured` takes entries out of what it is given, and an id is another's when its object is gone.
        config, made = configured(dict(given), metadata, source)
        made = config.process_unet_state_dict(dict(made))
    return {key: (value, _numbers(value, *origins.get(id(value), (None, 0)))) for key, value in made.items()}


def stand_ins(views: dict[str, Tensor]) -> dict[str, Tensor]:
    """For a file's weights: copies of those with one dim at most, no numbers of the others.

    Copies, since what ComfyUI writes to them is not to be read from the file.
    """
    return {key: view.cpu().clone() if view.dim() < 2 else view.to("meta") for key, view in views.items()}


def _numbers(value: Tensor, origin: Tensor | None, version: int) -> Tensor | None:
    """version: of the stand-in `value` as long as nothing was written to it."""
    if not value.is_meta:
        return value
    return origin if value._version == version else None


def is_same(key: str, in_file: tuple[Tensor, Tensor | None], weight: Tensor) -> bool:
    """Whether one of `named_by_comfyui` and the weight of a state dict are, as far as can be seen, the same."""
    shape, numbers = in_file
    if key.endswith(".comfy_quant"):
        return numbers is not None and _same_note(_note(numbers), _note(weight))
    if shape.shape != weight.shape:
        return False
    return numbers is None or all(_same_bytes(a, b) for a, b in zip(_sample(numbers), _sample(weight), strict=True))


def _sample(weight: Tensor) -> Iterator[Tensor]:
    """Some of the numbers, the same ones of each weight of a shape."""
    weight = weight.detach()
    if weight.numel() <= SMALL:
        yield weight
        return
    num = weight.shape[0] if weight.dim() > 1 else 1
    for row in sorted({index * (num - 1) // (NUM_ROWS - 1) for index in range(NUM_ROWS)}):
        flat = (weight[row] if weight.dim() > 1 else weight).reshape(-1)
        middle = len(flat) // 2
        yield from (flat[:NUM_TOGETHER], flat[middle : middle + NUM_TOGETHER], flat[-NUM_TOGETHER:])


def _same_bytes(in_file: Tensor, loaded: Tensor) -> bool:
    """Whether what is in the file makes, in the MODEL's dtype, the very numbers that it has."""
    if torch.uint8 in (in_file.dtype, loaded.dtype) and in_file.element_size() == loaded.element_size() == 1:
        in_file = in_file.contiguous().view(loaded.dtype)  # scales that a file keeps as bytes
    made = in_file.to(loaded.dtype).contiguous().reshape(-1)
    return torch.equal(made.view(torch.uint8), loaded.cpu().contiguous().reshape(-1).view(torch.uint8))


def _note(value: Tensor) -> dict[str, Any]:
    """What ComfyUI's note on a quantised layer says; older ones have a part of it one level deeper."""
    said = json.loads(bytes(value.tolist()))
    deeper = said.get("params")
    return {**UNSAID, **(deeper if isinstance(deeper, dict) else {}), **said}


def _same_note(in_file: dict[str, Any], loaded: dict[str, Any]) -> bool:
    return all(in_file.get(name) == loaded.get(name) for name in ("format", *UNSAID))
