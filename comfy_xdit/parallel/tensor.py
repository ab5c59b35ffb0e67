"""Tensor parallel: which part of each weight a rank holds, from the family's plan.

A Linear cut by columns gives each rank a part of its outputs (some heads, some hidden units of an MLP);
the Linear after it, cut by rows, takes those as inputs, and the ranks' results are added up (`sharded.py`). Modulations
are cut by columns too, or more than a quarter of a Flux would be whole on every rank; their few outputs are
joined at once.
Source: Megatron-LM, arXiv 1909.08053, whose names are for weights as [input, output].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError

from .paths import find
from .sequence import Runs
from .spec import WeightShare
from .tensor_plan import TensorPlan, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """A part of a weight: `rows` of its rows from `row` on, and of those the `columns` (first, number); None: all."""

    row: int
    rows: int
    columns: tuple[tuple[int, int], ...] | None = None

    def columns_of(self, rows: Tensor) -> Tensor:
        """A copy of the region's columns, from whole rows; the rows themselves where it has all columns."""
        if self.columns is None:
            return rows
        return torch.cat([rows.narrow(1, first, number) for first, number in self.columns], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a weight: the runs (first, number) along `dim`."""

    dim: int
    runs: Runs

    def of(self, weight: Tensor) -> Tensor:
        """Of the whole weight; a view of it where it is one run of rows."""
        parts = [weight.narrow(self.dim, first, number) for first, number in self.runs]
        return parts[0] if len(parts) == 1 and self.dim == 0 else torch.cat(parts, self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer whose weight is cut along `dim`, and the sizes of the pieces there, each of which is cut by itself."""

    path: str
    module: Any
    dim: int
    pieces: list[int]


def shards(module: nn.Module, plan: TensorPlan, share: WeightShare) -> dict[str, Shard | None]:
    """Weight → the part that this rank holds, for all that are cut; None for what another rank holds whole.

    The bias of a Linear cut by rows stays on the first rank alone, so that the sum has it once.
    Raises InputError for sizes that the degree does not divide, ValueError where the plan is for other layers.
    """
    found: dict[str, Shard | None] = {}
    for layer in _layers(module, plan):
        runs, first = [], 0
        for size in layer.pieces:
            number = _per_rank(size, share, layer.path)
            runs.append((first + number * share.shard, number))
            first += size
        shard = Shard(dim=layer.dim, runs=tuple(runs))
        found[f"{layer.path}.weight"] = shard
        if getattr(layer.module, "bias", None) is None:
            continue
        if layer.dim == 0:
            found[f"{layer.path}.bias"] = shard
        elif share.shard != 0:
            found[f"{layer.path}.bias"] = None
    return found


def regions(module: nn.Module, plan: TensorPlan, share: WeightShare) -> dict[str, Region | None]:
    """As `shards`, for weights whose rows are read one by one; of each the rows must be one run."""
    found: dict[str, Region | None] = {}
    for name, shard in shards(module, plan, share).items():
        if shard is None:
            found[name] = None
        elif shard.dim == 0:
            ((row, rows),) = shard.runs
            found[name] = Region(row=row, rows=rows)
        else:
            found[name] = Region(row=0, rows=module.get_parameter(name).shape[0], columns=shard.runs)
    return found


def keep_own_heads(module: nn.Module, plan: TensorPlan, share: WeightShare) -> None:
    """Modules count what this rank has, and nothing is left where another rank holds a bias.

    To be called once, after `shards`, which goes by the whole counts.
    """
    elsewhere = [name for name, shard in shards(module, plan, share).items() if shard is None]
    for path, counter, name in _counters(module, plan):
        setattr(counter, name, _per_rank(getattr(counter, name), share, f"{path}.{name}"))
    for name in elsewhere:
        path, _, parameter = name.rpartition(".")
        setattr(module.get_submodule(path), parameter, None)


def keep_own_shards(module: nn.Module, plan: TensorPlan, share: WeightShare) -> None:
    """`module`, whose weights are whole, holds this rank's part of them from now on."""
    own = {name: shard for name, shard in shards(module, plan, share).items() if shard is not None}
    keep_own_heads(module, plan, share)
    for name, shard in own.items():
        path, _, parameter = name.rpartition(".")
        part = shard.of(module.get_parameter(name).data).clone()
        setattr(module.get_submodule(path), parameter, nn.Parameter(part, requires_grad=False))


def common_divisor(module: nn.Module, plan: TensorPlan) -> int:
    """What a degree must divide to cut all that is cut of a whole module evenly; it needs no weights."""
    sizes = [size for layer in _layers(module, plan) for size in layer.pieces]
    return math.gcd(*sizes, *(getattr(counter, name) for _, counter, name in _counters(module, plan)))


def layers_cut(module: nn.Module, plan: TensorPlan) -> list[nn.Module]:
    """The layers with weights that are cut."""
    return [layer.module for layer in _layers(module, plan)]


def _layers(module: nn.Module, plan: TensorPlan) -> Iterator[Layer]:
    columns: dict[str, Widths] = dict.fromkeys((*plan.columns, *plan.joined, *plan.norms), (1,))
    for dim, patterns in ((0, {**columns, **plan.fused}), (1, plan.rows)):
        for pattern, widths in patterns.items():
            for path, child in find(module, pattern):
                if (size := _size(child, dim)) is not None:
                    owner = module.get_submodule(path.rpartition(".")[0])
                    pieces = _pieces(owner, path, size, widths)
                    yield Layer(path=path, module=child, dim=dim, pieces=pieces)


def _size(layer: nn.Module, dim: int) -> int | None:
    """Of the layer's weight along `dim`, which may not be there yet; None for a layer without one."""
    if isinstance(layer, nn.RMSNorm):
        return int(layer.normalized_shape[-1])
    # Not by its class: ComfyUI's layers that may be quantised are no Linears of torch's.
    size = getattr(layer, "in_features" if dim else "out_features", None)
    return size if isinstance(size, int) else None


def _pieces(owner: nn.Module, path: str, size: int, widths: Widths) -> list[int]:
    """How wide the pieces are of which `size` is made."""
    shares = [getattr(owner, width) if isinstance(width, str) else width for width in widths]
    unit, rest = divmod(size, sum(shares))
    if rest or not unit:
        raise ValueError(f"the {size} channels of {path} are not made of {shares}; the plan is for another version")
    return [unit * share for share in shares]


def _counters(module: nn.Module, plan: TensorPlan) -> list[tuple[str, Any, str]]:
    """(path, module, attribute) of all that is counted."""
    counts = [*((pattern, ("heads",)) for pattern in plan.heads), *plan.counts.items()]
    found = [(path, child, names) for pattern, names in counts for path, child in find(module, pattern)]
    return [(path, child, name) for path, child, names in found for name in names]


def _per_rank(size: int, share: WeightShare, path: str) -> int:
    if size % share.num_shards:
        raise InputError(f"tensor={share.num_shards} cannot cut the {size} channels of {path} evenly; use 1")
    return size // share.num_shards
