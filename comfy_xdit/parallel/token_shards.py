"""This rank's part of what a model passes around, and the way back to tensors of whole size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError

from .attention import Places
from .context import Axis
from .patch_tokens import PatchTokens
from .sequence import Runs, join, shard_sizes
from .tokens import Index, Ranges, Refused, Rule, Streams, Tokens


@dataclasses.dataclass(kw_only=True)
class TokenShards:
    """Which tokens of each stream this rank holds in one forward.

    axis: of the ranks over which each stream is cut.
    patch: what is computed of each stream; None for all.
    lengths: of the whole streams, as far as they are known. grids: of those that lie along several dims.
    """

    axis: Axis
    patch: PatchTokens | None = None
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    grids: dict[Streams, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    _pieces: dict[tuple[Streams, int], list[tuple[int, int]]] = dataclasses.field(default_factory=dict)

    @property
    def cuts(self) -> bool:
        return self.axis.degree > 1 or self.patch is not None

    def learn(self, found: list[tuple[Tensor, Tokens]]) -> None:
        """Lengths from whole tensors: of those with one stream first, then of what several leave over.

        Raises ValueError where a stream has another length than before, or several are unknown.
        """
        for x, rule in sorted(found, key=lambda pair: len(pair[1].streams)):
            grid = tuple(x.shape[rule.dim : rule.dim + rule.grid])
            unknown = [stream for stream in rule.streams if stream not in self.lengths]
            rest = math.prod(grid) - sum(self.lengths.get(stream, 0) for stream in rule.streams)
            if len(unknown) > 1 or rest < 0 or (rest and not unknown):
                raise ValueError(f"{math.prod(grid)} tokens of {rule.streams}, of which {self.lengths} are known")
            self.lengths.update(dict.fromkeys(unknown, rest))
            if rule.grid > 1:
                self.grids[rule.streams] = grid

    @property
    def short(self) -> str | None:
        """A stream of fewer tokens than ranks, if there is one."""
        return next((name for name, num in self.lengths.items() if 0 < num < self.axis.degree), None)

    def of(self, streams: Streams) -> tuple[int, ...]:
        """The whole streams' lengths."""
        return tuple(self.lengths[stream] for stream in streams)

    def runs(self, streams: Streams) -> tuple[Runs, ...]:
        """For each stream the tokens that are computed, on all ranks together."""
        if self.patch is None:
            return tuple(((0, length),) for length in self.of(streams))
        return tuple(self.patch.runs(stream, self.lengths[stream], self.axis.degree) for stream in streams)

    def computed(self, streams: Streams) -> list[int]:
        """How many tokens of each that are."""
        return [sum(size for _, size in runs) for runs in self.runs(streams)]

    def pieces(self, streams: Streams) -> list[tuple[int, int]]:
        """What this rank holds, as (first token, number); the first in the sequence of all `streams`."""
        key = streams, self.axis.degree
        if key not in self._pieces:
            places = Places.of(self.of(streams), self.axis.degree, self.runs(streams))
            self._pieces[key] = places.spans[self.axis.index]
        return self._pieces[key]

    def own(self, streams: Streams) -> list[int]:
        """How many tokens of each this rank holds."""
        return [shard_sizes(num, self.axis.degree)[self.axis.index] for num in self.computed(streams)]

    def narrow(self, value: Any, rule: Rule) -> Any:
        """This rank's part of a whole value; None stays None.

        Raises InputError for what is refused, ValueError or TypeError for what doesn't fit its rule.
        """
        if isinstance(rule, Refused) and value is not None:
            raise InputError(rule.why)
        if value is None or isinstance(rule, Refused) or not self.cuts:
            return value
        if isinstance(rule, Ranges):
            return self._ranges(value, rule)
        if isinstance(rule, Index):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise TypeError(f"{value!r} is no place in the tokens of {rule.streams}")
            return sum(min(max(value - first, 0), size) for first, size in self.pieces(rule.streams))
        if isinstance(value, (tuple, list)):
            return type(value)(item if isinstance(item, bool) else self.narrow(item, rule) for item in value)
        if rule.expands and not isinstance(value, Tensor):
            return type(value)(self._tokens(value.expand(), rule), None)
        if not isinstance(value, Tensor):
            raise TypeError(f"a {type(value).__name__} where tokens of {rule.streams} are known as tensors")
        return self._tokens(value, rule)

    def _tokens(self, x: Tensor, rule: Tokens) -> Tensor:
        if rule.ndim not in (None, x.ndim):
            return x
        x = _flat(x, rule)
        num, whole = x.shape[rule.dim], sum(self.of(rule.streams))
        pieces = self.pieces(rule.streams)
        if num == 1 and whole != 1:
            return x
        if num == whole:
            parts = [x.narrow(rule.dim, first, size) for first, size in pieces]
            return (torch.cat(parts, rule.dim) if len(parts) > 1 else parts[0]).contiguous()
        if not rule.spread or num > whole:
            raise ValueError(f"{num} entries for {whole} tokens of {rule.streams}")
        tokens = torch.cat([torch.arange(first, first + size, device=x.device) for first, size in pieces])
        return x.index_select(rule.dim, tokens // math.ceil(whole / num))

    def _ranges(self, ranges: Any, rule: Ranges) -> list[tuple[Any, ...]]:
        whole, offset = sum(self.of(rule.streams)), 0
        found: list[tuple[Any, ...]] = []
        for first, size in self.pieces(rule.streams):
            for start, end, *what in ranges:
                end = whole if end is None else end
                if not 0 <= start <= end <= whole:
                    raise ValueError(f"a range from {start} to {end} in {whole} tokens of {rule.streams}")
                low, high = max(start, first), min(end, first + size)
                if low < high:
                    found.append((low - first + offset, high - first + offset, *what))
            offset += size
        return found

    def whole_shaped(self, x: Tensor, rule: Tokens) -> Tensor:
        """A tensor of whole size with this rank's tokens `x` at their places, and 0 at the others'."""
        if not self.cuts:
            return x
        return self._shaped(self._placed(x, rule, self.pieces(rule.streams)), rule)

    def joined(self, x: Tensor, rule: Tokens) -> Tensor:
        """A tensor of whole size with every rank's tokens. Collective over the axis."""
        if not self.cuts:
            return x
        own = self.own(rule.streams)
        self._check(x, rule, own)
        parts = zip(x.split(own, rule.dim), self.computed(rule.streams), strict=True)
        tokens = torch.cat([join(part, rule.dim, num, self.axis) for part, num in parts], rule.dim)
        if self.patch is not None:
            tokens = self._placed(tokens, rule, Places.of(self.of(rule.streams), 1, self.runs(rule.streams)).spans[0])
        return self._shaped(tokens, rule)

    def _placed(self, x: Tensor, rule: Tokens, pieces: list[tuple[int, int]]) -> Tensor:
        """Zeros of whole size, with the tokens `x` in these places."""
        sizes = [size for _, size in pieces]
        self._check(x, rule, sizes)
        shape = list(x.shape)
        shape[rule.dim] = sum(self.of(rule.streams))
        whole = x.new_zeros(shape)
        for part, (first, size) in zip(x.split(sizes, rule.dim), pieces, strict=True):
            whole.narrow(rule.dim, first, size).copy_(part)
        return whole

    def _check(self, x: Tensor, rule: Tokens, sizes: list[int]) -> None:
        if x.shape[rule.dim] != sum(sizes):
            raise ValueError(f"{x.shape[rule.dim]} tokens of {rule.streams} on a rank that holds {sizes}")

    def _shaped(self, x: Tensor, rule: Tokens) -> Tensor:
        return x if rule.grid == 1 else x.reshape(*x.shape[: rule.dim], *self.grids[rule.streams], *_after(x, rule))


def _flat(x: Tensor, rule: Tokens) -> Tensor:
    """The tokens of a grid along its first dim, of 1 along the others."""
    if rule.grid == 1:
        return x
    return x.reshape(*x.shape[: rule.dim], -1, *(1,) * (rule.grid - 1), *_after(x, rule))


def _after(x: Tensor, rule: Tokens) -> torch.Size:
    return x.shape[rule.dim + rule.grid :]
