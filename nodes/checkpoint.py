"""The file that the workers read a model from, and what its header says."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.messages import LoadModel
from comfy_xdit.models import Family, comfy_layout, detect
from comfy_xdit.parallel.spec import BALANCES, ModelShape
from comfy_xdit.weights.header import FLOATS, TensorInfo, read_header
from comfy_xdit.weights.quantised import layer_formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusion transformer in a safetensors file.

    prefix: what its keys start with; infos: header entries without it; config: of the diffusers model.
    version: changes when the file is replaced by another one of the same name.
    """

    path: str
    prefix: str
    family: Family
    infos: dict[str, TensorInfo]
    config: dict[str, Any]
    version: str

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
            model="|".join([self.path, self.prefix, self.version, *names]),
            path=self.path,
            prefix=self.prefix,
            family=self.family.name,
            storage_dtype=names[0],
            compute_dtype=names[1],
            balance=balance,
        )


def open_checkpoint(path: str) -> Checkpoint:
    """The transformer in the file at `path`; only the header is read.

    Raises ValueError, in one sentence, for a damaged file and for a model that can't run on a pool.
    """
    path = os.path.realpath(path)
    header = read_header(path)
    family, prefix = detect(header, layer_formats(path, header))
    infos = {key[len(prefix) :]: info for key, info in header.items() if key.startswith(prefix)}
    layout, _ = comfy_layout(family, infos)
    status = os.stat(path)
    return Checkpoint(
        path=path,
        prefix=prefix,
        family=family,
        infos={key: info for key, info in infos.items() if info.dtype in FLOATS},
        config=family.config(layout),
        version=f"{status.st_size}-{status.st_mtime_ns}",
    )
