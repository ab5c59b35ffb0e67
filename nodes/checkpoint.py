"""The file that the workers read a model from, and what its header says."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import FileStamp, LoadModel
from comfy_xdit.models import Family, comfy_layout, detect
from comfy_xdit.parallel.spec import BALANCES, ModelShape
from comfy_xdit.weights.header import FLOATS, TensorInfo, read_header
from comfy_xdit.weights.quantised import layer_formats
from comfy_xdit.weights.stamp import stamp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusion transformer in a safetensors file.

    prefix: what its keys start with; infos: header entries without it; config: of the diffusers model.
    stamp: of the file whose header this is. What the workers load must be that one. whose: class it will be, for a log;
    way_out: how a MODEL gets a file that every machine can read.
    """

    whose: ClassVar[str] = ""
    way_out: ClassVar[str] = "load it with Load Diffusion Model (xDiT)"

    path: str
    prefix: str
    family: Family
    infos: dict[str, TensorInfo]
    config: dict[str, Any]
    stamp: FileStamp

    def is_current(self) -> bool:
        """Whether the file is there, and nobody has written to it or replaced it since."""
        try:
            return stamp(self.path) == self.stamp
        except (InputError, OSError):
            return False

    @property
    def shape(self) -> ModelShape:
        return self.family.shape(self.config)

    @property
    def meta(self) -> dict[str, Tensor]:
        """Key → tensor on the meta device: what ComfyUI's model detection reads."""
        return {
            key: torch.empty(info.shape, dtype=FLOATS[info.dtype], device="meta")
            for key, info in self.infos.items()
        }

    def load(self, *, storage: torch.dtype, compute: torch.dtype, balance: str = BALANCES[0]) -> LoadModel:
        """The message that makes it resident, weights kept as `storage`, sums done in `compute`.

        balance: what the stages of a pipeline have alike.
        """
        names = [str(dtype).removeprefix("torch.") for dtype in (storage, compute)]
        return LoadModel(
            model="|".join([self.path, self.prefix, *names]),
            path=self.path,
            prefix=self.prefix,
            family=self.family.name,
            storage_dtype=names[0],
            compute_dtype=names[1],
            balance=balance,
            stamp=self.stamp,
        )


def open_checkpoint(path: str) -> Checkpoint:
    """The transformer in the file at `path`; only the header is read.

    Raises ValueError, in one sentence, for a damaged file and for a model that can't run on a pool.
    """
    path = os.path.realpath(path)
    # First, and of no pipe: opening one would wait for a writer. Who writes meanwhile gives it another stamp.
    found = stamp(path)
    header = read_header(path)
    family, prefix = detect(header, layer_formats(path, header))
    infos = {key[len(prefix) :]: info for key, info in header.items() if key.startswith(prefix)}
    layout, _ = comfy_layout(family, infos)
    return Checkpoint(
        path=path,
        prefix=prefix,
        family=family,
        infos={key: info for key, info in infos.items() if info.dtype in FLOATS},
        config=family.config(layout),
        stamp=found,
    )


def version_of(path: str | None) -> str:
    """What a loader's IS_CHANGED tells ComfyUI: another text for another file. path: None when it is gone."""
    return "" if path is None else repr(stamp(path))
