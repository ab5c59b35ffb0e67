"""Tensor parallel: which part of each weight a rank holds, from the family's plan.

A Linear cut by columns gives each rank a part of its outputs (some heads, some hidden units of an MLP);
the Linear after it, cut by rows, takes those as inputs, and the ranks' results are added up. Modulations
are cut by columns too, or more than a quarter of a Flux would be whole on every rank; their few outputs are
joined at once.
Source: Megatron-LM, arXiv 1909.08053, whose names are for weights as [input, output].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError

from .paths import find
from .plan import TensorPlan
from .spec import WeightShare


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


def regions(module: nn.Module, plan: TensorPlan, share: WeightShare) -> dict[str, Region | None]:
    """Weight → the region that this rank holds, for all that are cut; None for what another rank holds whole.

    The bias of a Linear cut by rows stays on the first rank alone, so that the sum has it once.
    Raises InputError for sizes that the degree does not divide.
    """
    found: dict[str, Region | None] = {}
    for pattern in (*plan.columns, *plan.joined):
        for path, linear in _linears(module, pattern):
            rows = _per_rank(linear.out_features, share, path)
            region = Region(row=rows * share.shard, rows=rows)
            found |= {f"{path}.{name}": region for name, _ in linear.named_parameters(recurse=False)}
    for pattern, pieces in plan.rows.items():
        for path, linear in _linears(module, pattern):
            unit = linear.in_features // sum(pieces)
            columns, first = [], 0
            for piece in pieces:
                number = _per_rank(unit * piece, share, path)
                columns.append((first + number * share.shard, number))
                first += unit * piece
            found[f"{path}.weight"] = Region(row=0, rows=linear.out_features, columns=tuple(columns))
            if linear.bias is not None and share.shard != 0:
                found[f"{path}.bias"] = None
    return found


def keep_own_heads(module: nn.Module, plan: TensorPlan, share: WeightShare) -> None:
    """Attention modules count the heads of this rank, and nothing is left where another rank holds a bias."""
    for pattern in plan.heads:
        for _, attention in find(module, pattern):
            attention.heads = attention.heads // share.num_shards  # type: ignore[assignment,operator]
    for name, region in regions(module, plan, share).items():
        if region is None:
            path, _, parameter = name.rpartition(".")
            setattr(module.get_submodule(path), parameter, None)


def _linears(module: nn.Module, pattern: str) -> list[tuple[str, Any]]:
    return [(path, child) for path, child in find(module, pattern) if isinstance(child, nn.Linear)]


def _per_rank(size: int, share: WeightShare, path: str) -> int:
    if size % share.num_shards:
        raise InputError(f"tensor={share.num_shards} cannot cut the {size} channels of {path} evenly; use 1")
    return size // share.num_shards
