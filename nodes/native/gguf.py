"""A MODEL of ComfyUI-GGUF's loader as data: its file, which nobody names, is where its weights lie in memory."""

from __future__ import annotations

import os
from typing import Any

from comfy_xdit_nodes.native.gguf_pack import reader_of
from comfy_xdit_nodes.native.same_weights import is_same
from comfy_xdit_nodes.native.source import load_message, source_of
from comfy_xdit_nodes.patches import MODEL
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import LoadModel
from comfy_xdit.native.gguf import weights_of
from comfy_xdit.native.load import configured
from comfy_xdit.weights.stamp import stamp

AGAIN = "load it anew (Free model and node cache, in ComfyUI's menu), with Parallel Model (xDiT) behind its loader"


def describe(patcher: Any) -> LoadModel:
    """What has a worker load the same model by the same pack.

    Raises ValueError where the file isn't to be found, or no longer has these weights.
    """
    source = source_of(patcher.model.model_config)
    weights = _weights(patcher)
    packed = [weight for weight in weights.values() if getattr(weight, "tensor_shape", None) is not None]
    paths = {_file_at(weight.data_ptr()) for weight in packed}
    path = paths.pop() if len(paths) == 1 else None
    if path is None:
        raise ValueError(
            f"the workers can't load this MODEL: its GGUF file is gone, or ComfyUI has copied the weights; {AGAIN}"
        )
    # First: who writes to the file while it is looked at gives it another stamp.
    before = stamp(path)
    if (why := _why_not_of(path, patcher, weights)) is not None or stamp(path) != before:
        raise ValueError(
            f"the workers can't load {os.path.basename(path)} for its MODEL: {why or 'it was written to'}; {AGAIN}"
        )
    return load_message(path, source, before)


def _weights(patcher: Any) -> dict[str, Tensor]:
    """The transformer's parameters as they were loaded, without the LoRA that ComfyUI may have merged into them."""
    merged = {key: kept.weight for key, kept in patcher.backup.items()}
    named = patcher.model.diffusion_model.named_parameters()
    return {key: merged.get(MODEL + key, weight) for key, weight in named}


def _file_at(address: int) -> str | None:
    """The file that is mapped at an address of this process, if it still is what its path leads to."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, _, _, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            begin, end = (int(part, 16) for part in span.split("-"))
            if begin <= address < end:
                is_there = bool(path) and os.path.isfile(path[0]) and os.stat(path[0]).st_ino == int(inode)
                return path[0] if is_there else None
    return None


def _why_not_of(path: str, patcher: Any, weights: dict[str, Tensor]) -> str | None:
    """What tells the file's weights from `weights`; None where nothing does."""
    config = patcher.model.model_config
    try:
        found, in_file = configured(weights_of(reader_of(config)(path)), None, source_of(config))
    except (InputError, KeyError, TypeError, ValueError) as error:
        return str(error)
    in_file = found.process_unet_state_dict(dict(in_file))
    for key, weight in weights.items():
        if key not in in_file:
            return f"it has no {key}"
        form = getattr(weight, "tensor_type", None)
        if form is not None and getattr(in_file[key], "tensor_type", None) != form:
            return f"its {key} is in another format"
        plain = _plain(in_file[key])
        if not is_same(key, (plain, plain), _plain(weight)):
            return f"{key} is another one"
    return None


def _plain(weight: Tensor) -> Tensor:
    """As it lies in the file."""
    return weight.as_subclass(Tensor)
