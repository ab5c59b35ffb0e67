"""Which weights of a model are cut over the tensor axis, as data; `tensor.py` and `sharded.py` put it into effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

Widths = tuple[int | str, ...]
"""How wide the pieces of a weight's channels are, in any unit: numbers, or attributes of the module with the layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """Which weights are cut over the tensor axis, in equal shares; all others are whole on every rank.

    columns: Linears whose outputs are cut: the projections to heads, the first ones of MLPs. fused: those of several
    projections in one → how wide these are; each is cut by itself.
    joined: Linears whose outputs are cut and joined at once: modulations, which have few rows and many weights.
    rows: Linears whose inputs are such outputs → how wide the pieces are that the input is joined from; each piece is
    cut by itself. What they put out is added up over the ranks.
    heads: the attention modules, whose attribute `heads` then counts a rank's own. counts: modules → other attributes
    that do.
    norms: RMSNorms over all heads, whose mean is over all ranks then; other norms of queries and keys must be for one
    head each.
    per_head: modules → arguments with an entry for each head → their dim of heads, if that is not of size 1.
    """

    columns: tuple[str, ...]
    joined: tuple[str, ...] = ()
    rows: dict[str, Widths]
    heads: tuple[str, ...] = ()
    fused: dict[str, Widths] = dataclasses.field(default_factory=dict)
    counts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    norms: tuple[str, ...] = ()
    per_head: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


def tensor_within(
    *blocks: str,
    columns: tuple[str, ...],
    rows: tuple[str, ...],
    joined: tuple[str, ...] = (),
    fused: dict[str, Widths] | None = None,
    counts: dict[str, tuple[str, ...]] | None = None,
    norms: tuple[str, ...] = (),
    per_head: dict[str, dict[str, int]] | None = None,
) -> TensorPlan:
    """The plan of layers that are named alike in all these `blocks`, whose rows' inputs are of one piece each."""

    def names(lines: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{block}.{line}" for block in blocks for line in lines)

    def table(lines: dict[str, Any] | None) -> dict[str, Any]:
        return {f"{block}.{line}": what for block in blocks for line, what in (lines or {}).items()}

    return TensorPlan(
        columns=names(columns),
        joined=names(joined),
        rows=dict.fromkeys(names(rows), (1,)),
        fused=table(fused),
        counts=table(counts),
        norms=names(norms),
        per_head=table(per_head),
    )
