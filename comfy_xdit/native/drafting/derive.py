"""A plan, drafted from a tiny model's calls.

Sizes say which argument holds which tokens: each call is made again with more of one stream, and what grew holds it.
NaN says the rest: an argument filled with it shows which rows of attention are of its stream, and an output filled with
it in which order the next blocks have the streams. Some things don't show: what is to be refused, joins that are not
after the last block, a second order of what looks alike. So a draft is nothing before the self-test holds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.native.subject import Call
from comfy_xdit.parallel.tokens import Attention, Blocks, Index, Ranges, Rule, Streams, TokenPlan, Tokens

from .grow import growths
from .watch import Attended, Poison, Seen, watch

JOINT = ("all",)
"""Of text and image that are in one tensor before the first block: no block tells them apart."""

Grown = dict[str, list[Seen]]
"""Stream → what is seen with more of it, once for each dim along which there can be more."""


@dataclasses.dataclass(frozen=True)
class Moves:
    """Where an argument, or an output, grows with a call. dims: dim → streams; ndim: how many dims it has.

    is_grid: each of several dims in a row grows with another side of the image.
    """

    dims: dict[int, Streams]
    ndim: int
    is_grid: bool

    @property
    def dim(self) -> int:
        return min(self.dims)

    @property
    def streams(self) -> Streams:
        """Of the streams that move it, without an order."""
        return self.dims[self.dim]


def derive(models: list[tuple[nn.Module, dict[str, Call]]]) -> TokenPlan:
    """The draft of one plan for all these models. Raises InputError where not even one can be made."""
    groups = [[_Draft(model, call) for call in calls.values()] for model, calls in models]
    takes: dict[str, dict[str, Rule]] = {}
    gives: dict[str, tuple[str, ...]] = {}
    attention: dict[str, Attention] = {}
    for first, draft in [(group[0], draft) for group in groups for draft in group]:
        if draft.grown.keys() < first.grown.keys():
            continue  # of what can't grow in a call it is not known where it is
        for owner in [owner for owner in first.lists() if owner in draft.seen.given]:
            gives.setdefault(owner, tuple(first.gives(owner)))
            takes[owner] = _merged(takes.get(owner, {}), draft.takes(owner, first))
            attention = _attending(attention, draft.attention(owner, first))
    if not takes:
        raise InputError("no list of blocks with attention grows with the image; a plan for this class must be written")
    everyone = [draft for group in groups for draft in group]
    blocks = [
        Blocks(
            path=owner,
            takes={path: _of_dims(rule, owner, path, everyone) for path, rule in rules.items()},
            gives=gives[owner],
        )
        for owner, rules in takes.items()
    ]
    return TokenPlan(blocks=tuple(blocks), attention=attention)


def _merged(known: dict[str, Rule], new: dict[str, Rule]) -> dict[str, Rule]:
    """Rules of one call with those of another, where the same argument may have fewer entries than tokens."""
    spread = {path: rule for path, rule in new.items() if isinstance(rule, Tokens) and rule.spread}
    return {**new, **known, **spread}


def _of_dims(rule: Rule, owner: str, path: str, drafts: list[_Draft]) -> Rule:
    """The rule for tensors of its dims alone, where an argument has others in another call."""
    values = [draft.seen.given.get(owner, {}).get(path) for draft in drafts]
    is_one = len({value.ndim for value in values if isinstance(value, Tensor)}) < 2
    return dataclasses.replace(rule, ndim=None) if is_one and isinstance(rule, Tokens) else rule


def _attending(known: dict[str, Attention], new: dict[str, Attention]) -> dict[str, Attention]:
    """Rules of one call with those of another, which may have a mask where the first has none."""
    masked = {path: known.get(path, rule) for path, rule in new.items() if rule.mask == "own"}
    own = {path: dataclasses.replace(rule, mask="own") for path, rule in masked.items()}
    # Of some blocks, or models, that attend once more.
    longer = {path: max(known[path], new[path], key=lambda rule: len(rule.then)) for path in known.keys() & new.keys()}
    fewer = {
        path: dataclasses.replace(rule, or_fewer=True)
        for path, rule in longer.items()
        if len(known[path].then) != len(new[path].then)
    }
    return {**new, **known, **own, **fewer}


class _Draft:
    """What one call of a model says about its plan."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.seen = watch(model, call)
        self.grown: Grown = {}
        for stream, more in growths(call):
            try:
                self.grown.setdefault(stream, []).append(watch(model, more))
            except (RuntimeError, ValueError, AssertionError, IndexError):
                continue  # the model can't have more along this dim
        self._orders: dict[frozenset[str], Streams] = {}

    def lists(self) -> list[str]:
        """Lists whose blocks attend, and give what grows with an image or a sound."""
        return [
            owner
            for owner in self.seen.given
            if self.seen.attended[owner]
            and any({*moves.streams} - {"text"} for moves in self._outputs(owner) if moves is not None)
        ]

    def gives(self, owner: str) -> list[str]:
        """For each output the argument that it takes the place of. Raises InputError where none fits."""
        arguments, found = self._arguments(owner), []
        for out, moves in zip(self.seen.gave[owner], self._outputs(owner), strict=True):
            if moves is None:
                continue
            fits = [
                path
                for path, other in arguments.items()
                if other.dims == moves.dims and _shape(self.seen.given[owner][path]) == _shape(out)
            ]
            if not fits:
                raise InputError(f"an output of {owner} is like none of its arguments; its plan must be written")
            found.append(next((path for path in fits if path not in found), fits[0]))
        return found

    def takes(self, owner: str, first: _Draft) -> dict[str, Rule]:
        """The rules of a list's arguments."""
        gives = first.gives(owner)
        arguments, rules = self._arguments(owner), dict[str, Rule]()
        cut = {stream for path, moves in first._arguments(owner).items() if path in gives for stream in moves.streams}
        for path, moves in arguments.items():
            value = self.seen.given[owner][path]
            if {*moves.streams} <= cut and not self._is_whole_mask(owner, value):
                rules[path] = self._rule(owner, path, moves, first)
        of_gives = [moves for path, moves in first._arguments(owner).items() if path in gives]
        image = first.order(owner, next(moves.streams for moves in of_gives if "image" in moves.streams))
        for path, value in self.seen.given[owner].items():
            if isinstance(value, (list, int)) and not isinstance(value, bool) and self._changes(owner, path):
                rules[path] = Ranges(image) if isinstance(value, list) else Index(image)
        return rules

    def _rule(self, owner: str, path: str, moves: Moves, first: _Draft) -> Tokens:
        streams = first.order(owner, moves.streams)
        return Tokens(
            streams,
            dim=moves.dim,
            spread=self._is_spread(owner, path, moves),
            ndim=moves.ndim,
            grid=len(moves.dims) if moves.is_grid else 1,
            expands=callable(getattr(self.seen.given[owner][path], "expand", None))
            and not isinstance(self.seen.given[owner][path], Tensor),
        )

    def attention(self, owner: str, first: _Draft) -> dict[str, Attention]:
        """Path with a `*` → the rule of each module that attends to what is cut."""
        found: dict[str, Attention] = {}
        for number, call in enumerate(self.seen.attended[owner]):
            queries = self._attending(owner, number, "queries", first)
            keys = self._attending(owner, number, "keys", first)
            if not queries or not keys:
                continue
            path = call.path.replace(f"{owner}.0", f"{owner}.*", 1)
            if path in found:
                found[path] = dataclasses.replace(found[path], then=(*found[path].then, queries))
                continue
            own = call.mask is not None and not any(
                self._is_same_mask(value, call.mask) for value in self.seen.given[owner].values()
            )
            found[path] = Attention(
                queries,
                keys=None if keys == queries else keys,
                mask="own" if own else "whole",
                seam="sdpa" if call.seam == "sdpa" else "override",
            )
        return found

    def _attending(self, owner: str, number: int, side: str, first: _Draft) -> Streams:
        """The streams, in their order, of the queries or keys of one attention of a list's first block."""
        starts, lengths = dict[Streams, int](), dict[Streams, int]()
        for path in dict.fromkeys(first.gives(owner)):
            if path not in self.seen.given[owner]:
                continue
            rows = getattr(self._poisoned(owner, path)[number], side)
            if rows.any():
                moves = first._arguments(owner)[path]
                streams = first.order(owner, moves.streams)
                starts[streams] = int(rows.nonzero()[0])
                shape = _shape(self.seen.given[owner][path]) or ()
                lengths[streams] = math.prod(shape[dim] for dim in (moves.dims if moves.is_grid else [moves.dim]))
                num = len(rows)
        if starts and sum(lengths.values()) != num:
            # What an earlier attention of the block has brought from one stream to the other is no stream of this one.
            starts = {streams: start for streams, start in starts.items() if lengths[streams] == num}
        order = tuple(stream for streams in sorted(starts, key=lambda one: starts[one]) for stream in streams)
        if len(order) > 1:
            first._orders.setdefault(frozenset(order), order)
        return order

    def _poisoned(self, owner: str, path: str) -> list[Attended]:
        return watch(self.model, self.call, Poison(owner, argument=path)).attended[owner]

    def order(self, owner: str, streams: Streams) -> Streams:
        """The order in which streams are joined in the blocks of a list."""
        if len(streams) < 2:
            return streams
        key = frozenset(streams)
        if key not in self._orders:
            self._orders[key] = self._order_of_inputs(owner, streams) or self._order_of_attention(owner, key) or JOINT
        return self._orders[key]

    def _order_of_inputs(self, owner: str, streams: Streams) -> Streams:
        """As the outputs of the list before are found in an argument that holds all of them."""
        lists = self.lists()
        before = lists[lists.index(owner) - 1] if owner in lists and lists.index(owner) else None
        path = next((path for path in self.gives(owner) if {*self._arguments(owner)[path].streams} == {*streams}), None)
        if before is None or path is None:
            return ()
        starts = {}
        for number, moves in enumerate(self._outputs(before)):
            if moves is None or len(moves.streams) > 1:
                continue
            x = watch(self.model, self.call, Poison(before, output=number)).given[owner][path]
            rows = x.movedim(self._arguments(owner)[path].dim, 0).flatten(1).isnan().any(1)
            if rows.any() and not rows.all():
                starts[moves.streams[0]] = int(rows.nonzero()[0])
        rest = [stream for stream in streams if stream not in starts]
        if len(rest) > 1 or not starts:
            return ()
        # What no list before has had comes where the others leave room.
        for stream in rest:
            starts[stream] = 0 if min(starts.values()) > 0 else 1 + max(starts.values())
        return tuple(sorted(streams, key=lambda stream: starts[stream]))

    def _order_of_attention(self, owner: str, streams: frozenset[str]) -> Streams:
        """As the first attention has them that asks for all."""
        singles = {
            moves.streams[0]: path for path, moves in self._arguments(owner).items()
            if path in self.gives(owner) and len(moves.streams) == 1
        }
        if not streams <= singles.keys():
            return ()
        rows = {stream: self._poisoned(owner, singles[stream]) for stream in streams}
        for number in range(len(self.seen.attended[owner])):
            found = {stream: rows[stream][number].queries for stream in streams}
            if all(one.any() for one in found.values()):
                return tuple(sorted(streams, key=lambda stream: int(found[stream].nonzero()[0])))
        return ()

    # What grows.

    def _arguments(self, owner: str) -> dict[str, Moves]:
        found = {
            path: self._moves(value, lambda seen, path=path: seen.given[owner].get(path))
            for path, value in self.seen.given[owner].items()
        }
        return {path: moves for path, moves in found.items() if moves is not None}

    def _outputs(self, owner: str) -> list[Moves | None]:
        return [
            self._moves(value, lambda seen, number=number: seen.gave[owner][number])
            for number, value in enumerate(self.seen.gave[owner])
        ]

    def _moves(self, value: Any, of: Any) -> Moves | None:
        shape = _shape(value)
        dims: dict[int, list[str]] = {}
        by_side: list[int] = []
        for stream, all_seen in self.grown.items():
            for seen in all_seen:
                other = _shape(of(seen))
                if shape is None or other is None or len(other) != len(shape):
                    continue
                moved = [dim for dim, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
                by_side += moved[:1] if stream == "image" else []
                for dim in moved:
                    known = dims.setdefault(dim, [])
                    known += [stream] * (stream not in known)
        if not dims or shape is None:
            return None
        sides = sorted(set(by_side))
        in_a_row = bool(sides) and sides == list(range(sides[0], sides[0] + len(sides)))
        is_grid = in_a_row and len(by_side) == len(sides) > 1
        return Moves({dim: tuple(streams) for dim, streams in dims.items()}, len(shape), is_grid)

    def _is_spread(self, owner: str, path: str, moves: Moves) -> bool:
        """Whether there are fewer entries than tokens: one for each of several that follow one another."""
        if moves.is_grid:
            return False
        whole = max(
            [
                (_shape(self.seen.given[owner][other]) or ())[theirs.dim]
                for other, theirs in self._arguments(owner).items()
                if {*theirs.streams} == {*moves.streams} and not theirs.is_grid
            ]
        )
        return (_shape(self.seen.given[owner][path]) or ())[moves.dim] < whole

    def _changes(self, owner: str, path: str) -> bool:
        value = repr(self.seen.given[owner][path])
        return any(repr(seen.given[owner].get(path)) != value for all_seen in self.grown.values() for seen in all_seen)

    def _is_whole_mask(self, owner: str, value: Any) -> bool:
        """Whether attention gets an argument as its mask."""
        return any(self._is_same_mask(value, call.mask) for call in self.seen.attended[owner])

    @staticmethod
    def _is_same_mask(value: Any, mask: Tensor | None) -> bool:
        if mask is None or not isinstance(value, Tensor) or value.numel() != mask.numel():
            return False
        return torch.equal(value.reshape(-1).float(), mask.reshape(-1).float())


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a tensor, or of what stands for one: LTX's timesteps, or a tensor beside flags."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return next((tuple(item.shape) for item in value if isinstance(item, Tensor)), None)
    expanded = getattr(value, "expand", None)
    return tuple(expanded().shape) if callable(expanded) else None
