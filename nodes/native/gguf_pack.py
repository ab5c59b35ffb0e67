"""The node pack ComfyUI-GGUF in this process, as a MODEL of its loader shows it."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_xdit.messages import GGUFPack
from comfy_xdit.native.boot import hash_of_sources
from comfy_xdit.native.gguf import gguf_version

OPERATIONS = "GGMLOps"
"""What the pack calls the layers that it makes a model of."""


def pack_of(config: Any) -> GGUFPack | None:
    """The pack that made a model's layers, and what it was asked for; None where another did, or ComfyUI itself.

    config: of the loaded model.
    """
    module = ops_of(config)
    if module is None:
        return None
    folder, linear = str(Path(str(module.__file__)).resolve().parent), config.custom_operations.Linear
    return GGUFPack(
        folder=folder,
        sources=_sources(folder),
        package=gguf_version(),
        dequant_dtype=_name(linear.dequant_dtype),
        patch_dtype=_name(linear.patch_dtype),
    )


def ops_of(config: Any) -> ModuleType | None:
    """The pack's module of operations."""
    kind = config.custom_operations
    kind = kind if isinstance(kind, type) else type(kind)
    module = sys.modules.get(kind.__module__)
    return module if kind.__name__ == OPERATIONS and getattr(module, "__file__", None) else None


def reader_of(config: Any) -> Any:
    """The pack's function from a file's path to its weights."""
    module = ops_of(config)
    assert module is not None
    return sys.modules[module.__name__.removesuffix("ops") + "loader"].gguf_sd_loader


def _name(dtype: Any) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


# Once a process: a pack that is updated while ComfyUI runs is not what it runs.
@functools.cache
def _sources(folder: str) -> str:
    return hash_of_sources(Path(folder))
