"""A MODEL of the stock loaders as data: its file, and the choices that ComfyUI made for it."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from comfy_xdit_nodes.native.gguf_pack import pack_of
from comfy_xdit_nodes.native.same_weights import why_not_of

from comfy_xdit.messages import ComfySource, FileStamp, LoadModel
from comfy_xdit.native.load import config_hash
from comfy_xdit.weights.stamp import stamp

log = logging.getLogger("comfy_xdit")

LOADERS = ("load_diffusion_model", "load_checkpoint_guess_config")
"""Functions of comfy.sd whose first argument is the file that a MODEL came from."""


def describe(patcher: Any) -> LoadModel | None:
    """What has a worker load the same model by ComfyUI's own class; None when only the MODEL knows its weights.

    That is so for other loaders, files that can't be mapped, layers of another node's making, and where the file is
    no longer the one that the loader read, or the weights were changed in place, as far as `same_weights` can tell.
    """
    path, config = _file_of(patcher), patcher.model.model_config
    if path is None or config.custom_operations is not None:
        return None
    source = source_of(config)
    # First: who writes to the file while it is looked at gives it another stamp.
    before = stamp(path)
    reason = why_not_of(path, source, patcher)
    if reason is None and stamp(path) != before:
        reason = "it was written to"
    if reason is not None:
        log.info("the workers can't load %s for its MODEL: %s", os.path.basename(path), reason)
        return None
    return load_message(path, source, before)


def load_message(path: str, source: ComfySource, seen: FileStamp | None) -> LoadModel:
    """What has a worker load the file, of which `seen` is the stamp, as `source`."""
    named = [path, "ComfyUI", source.config, source.dtype, source.cast, str(source.fp8)]
    if source.gguf is not None:
        named += [source.gguf.sources, source.gguf.dequant_dtype, source.gguf.patch_dtype]
    return LoadModel(
        model="|".join(named),
        path=path,
        prefix="",
        family=source.kind,
        storage_dtype=source.dtype,
        compute_dtype=source.cast or source.dtype,
        stamp=seen,
        source=source,
    )


def source_of(config: Any) -> ComfySource:
    """ComfyUI's choices in the configuration of a loaded model."""
    cast = config.manual_cast_dtype
    return ComfySource(
        kind=type(config).__name__,
        config=config_hash(config),
        dtype=_name(config.unet_config["dtype"]),
        cast="" if cast is None else _name(cast),
        fp8=bool(config.optimizations.get("fp8", False)),
        gguf=pack_of(config),
    )


def _file_of(patcher: Any) -> str | None:
    init = getattr(patcher, "cached_patcher_init", None)
    if not init or getattr(init[0], "__name__", "") not in LOADERS or init[0].__module__ != "comfy.sd":
        return None
    path = str(init[1][0])
    is_mappable = path.lower().endswith((".safetensors", ".sft")) and os.path.isfile(path)
    return os.path.abspath(path) if is_mappable else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
