"""GGUF files in a worker: the client's own ComfyUI-GGUF reads them, and computes with them.

Of that node pack the reader and the operations are imported, never its nodes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.messages import GGUFPack

from .boot import RESTART, hash_of_sources

PACKAGE = "comfy_xdit_gguf_pack"
"""Under which name the pack is imported here."""

PARTS = ("loader.py", "ops.py", "dequant.py")


def weights_of(read: Any) -> dict[str, Tensor]:
    """Of what the pack's reader gives: the weights, in some versions with notes beside them."""
    return dict(read[0] if isinstance(read, tuple) else read)


class GGUF:
    """The pack that `told` names. operations: to make a model's layers of."""

    def __init__(self, told: GGUFPack) -> None:
        loader, ops, dequant = _imported(told)
        self._told = told
        self._read: Callable[[str], dict[str, Tensor]] = loader.gguf_sd_loader
        self._is_quantised: Callable[[Any], bool] = dequant.is_quantized
        self.operations = ops.GGMLOps()

    def read(self, path: str) -> dict[str, Tensor]:
        """Key → view of the mapped file, with the shape that it has as numbers. Raises InputError for no such file."""
        try:
            return weights_of(self._read(path))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            # What its reader raises for a damaged file.
            raise InputError(f"ComfyUI-GGUF can't read it ({type(error).__name__}); download it again") from error

    def is_quantised(self, weight: Any) -> bool:
        """Whether it is kept as blocks of bytes."""
        return bool(self._is_quantised(weight))

    def as_parameter(self, weight: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """What is to be loaded. dtype: of the parameter that is there; None where the layer takes a weight as it is."""
        if dtype is None or self.is_quantised(weight):
            return weight.to(device)
        return weight.to(device=device, dtype=dtype).as_subclass(Tensor)

    def tell_layers(self, net: nn.Module) -> None:
        """Give the layers the dtypes that the pack's loader node asks for."""
        for layer in net.modules():
            if isinstance(layer, self.operations.Linear):
                layer.dequant_dtype = _dtype(self._told.dequant_dtype)
                layer.patch_dtype = _dtype(self._told.patch_dtype)


def shapes_of(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of the weights that the pack's layers take from the file without having known them."""
    late = {path for path, layer in net.named_modules() if isinstance(layer, nn.Linear) and layer.weight is None}
    return {key: tuple(weight.shape) for key, weight in weights.items() if key.rpartition(".")[0] in late}


def gguf_version() -> str:
    """Of the Python package gguf; "" where it is not installed."""
    try:
        return importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _dtype(name: str) -> torch.dtype | str | None:
    """As the pack's layers keep it."""
    return name if name == "target" else getattr(torch, name) if name else None


def _imported(told: GGUFPack) -> list[Any]:
    """The pack's modules. Raises InputError where this machine has another one, or can't import it."""
    if not all((Path(told.folder) / name).is_file() for name in PARTS):
        raise InputError(
            "the workers find no ComfyUI-GGUF in the folder that this ComfyUI has it in; every machine of a pool needs "
            "the same node pack in the same folder"
        )
    if gguf_version() != told.package:
        raise InputError(
            f"the workers have the Python package gguf {gguf_version() or 'not installed'}, this ComfyUI "
            f"{told.package or 'none'}; give them the same, and restart the pool"
        )
    if _sources(told.folder) != told.sources:
        raise InputError(f"the workers have ComfyUI-GGUF with other sources than this ComfyUI; {RESTART}")
    known = sys.modules.get(PACKAGE)
    if known is None:
        # Not by its `__init__`, which imports its nodes and with them ComfyUI's.
        known = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
        known.__path__ = [told.folder]
    if known.__path__ != [told.folder]:
        raise InputError(f"the workers use a ComfyUI-GGUF in another folder; {RESTART}")
    return [importlib.import_module(f"{PACKAGE}.{name.removesuffix('.py')}") for name in PARTS]


# Once a process: what is imported stays, whatever becomes of the folder.
@functools.cache
def _sources(folder: str) -> str:
    return hash_of_sources(Path(folder))
