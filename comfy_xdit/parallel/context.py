"""The ranks of one job: which axes there are, where this rank stands on them, and what it sent.

A `ParallelContext` is made for each job and dropped at its end. Process groups are slow to make, and with NCCL
take memory of the device, so they are kept in a `GroupCache`, which the worker's service owns.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .spec import AXES, ParallelSpec
from .traffic import LineTraffic, Traffic, account, reset_peak

JOINED = {"lanes": ("dp", "cfg"), "sequence": ("distri", "ring", "ulysses")}
"""Axes made of others, outermost first: rows are dealt over "lanes", tokens are cut over "sequence"."""


LINKS = ("pipe odd", "pipe back")
"""The pipe axis again, each with a group of its own: a stage sends and receives at the same time, and what
waits for a peer must not hold up what that peer waits for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """This rank's line of ranks along one axis.

    ranks: their global ranks in order; index: this rank's place; group: None when it is alone. is_local: all of
    them are on one machine.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None
    traffic: LineTraffic
    is_local: bool = True

    @property
    def degree(self) -> int:
        return len(self.ranks)

    @property
    def alone(self) -> Axis:
        """An axis of this rank only: nothing is cut or joined on it."""
        return dataclasses.replace(self, ranks=(self.ranks[self.index],), index=0, group=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lines:
    """What the cache keeps for a spec: axis → (ranks, index, group) of this rank."""

    lines: dict[str, tuple[tuple[int, ...], int, dist.ProcessGroup | None]]


Line = tuple[tuple[int, ...], int, "dist.ProcessGroup | None"]
"""Ranks in order, this rank's place among them, and their group."""


class GroupCache:
    """Process groups for each spec used so far; specs whose axes cut the ranks alike share them.

    Making one is collective: every rank must ask for the same specs in the same order.
    world_size: how many ranks there are; with 1, torch.distributed need not be initialised. num_local: how many of
    them each machine has, numbered machine after machine; None: all.
    """

    def __init__(self, world_size: int, num_local: int | None = None) -> None:
        self.world_size = world_size
        self.num_local = num_local or world_size
        self._lines: dict[ParallelSpec, _Lines] = {}
        self._made: dict[tuple[str, tuple[tuple[int, ...], ...]], Line] = {}

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.world_size > 1 else 0

    @property
    def world(self) -> dist.ProcessGroup | None:
        """The group of all ranks; None when there is only one."""
        return dist.group.WORLD if self.world_size > 1 else None

    def are_local(self, ranks: Sequence[int]) -> bool:
        """Whether they are all on one machine."""
        return len({rank // self.num_local for rank in ranks}) == 1

    def lines(self, spec: ParallelSpec) -> _Lines:
        if spec not in self._lines:
            self._lines[spec] = self._make(spec)
        return self._lines[spec]

    def close(self) -> None:
        """Destroy the groups. Every rank must call."""
        for _, _, group in self._made.values():
            dist.destroy_process_group(group)
        self._made.clear()
        self._lines.clear()

    def _make(self, spec: ParallelSpec) -> _Lines:
        if spec.num_ranks != self.world_size:
            raise ValueError(
                f"{spec} does not fit a pool of {self.world_size}; "
                f"use degrees whose product is {self.world_size}"
            )
        lines: dict[str, Line] = {axis: ((self.rank,), 0, None) for axis in (*AXES, *JOINED, *LINKS)}
        # Axes of degree 1 need no group; leaving them out saves one group a rank for each.
        used = [axis for axis in AXES if getattr(spec, axis) > 1]
        for axis in used:
            lines[axis] = self._grouped(spec, [axis], "pipe" if axis == "pipe" else "")
        for name, axes in JOINED.items():
            lines[name] = self._joined(spec, lines, [axis for axis in axes if axis in used])
        for name in LINKS if spec.pipe > 1 else ():
            lines[name] = self._grouped(spec, ["pipe"], name)
        return _Lines(lines=lines)

    def _joined(self, spec: ParallelSpec, lines: dict[str, Line], axes: list[str]) -> Line:
        """Several axes, outermost first, as one."""
        if len(axes) < 2:
            return lines[axes[0]] if axes else ((self.rank,), 0, None)
        whole = math.prod(spec.degrees[axis] for axis in axes) == self.world_size
        return (tuple(range(self.world_size)), self.rank, self.world) if whole else self._grouped(spec, axes)

    def _grouped(self, spec: ParallelSpec, axes: list[str], link: str = "") -> Line:
        """This rank's line along `axes`. link: "pipe" or one of `LINKS`, whose groups are nobody else's."""
        degrees = spec.degrees
        grid = torch.arange(spec.num_ranks).view(tuple(degrees.values()))
        places = [AXES.index(axis) for axis in axes]
        degree = math.prod(degrees[axis] for axis in axes)
        rows = grid.movedim(places, list(range(-len(axes), 0))).reshape(-1, degree).tolist()
        key = (link, tuple(tuple(ranks) for ranks in rows))
        if key not in self._made:
            # new_group is collective over the world: every rank makes the groups of all, in one order.
            groups = [dist.new_group(ranks) for ranks in rows]
            mine = next(number for number, ranks in enumerate(rows) if self.rank in ranks)
            line = (key[1][mine], rows[mine].index(self.rank), groups[mine])
            if link:
                _introduce(line)
            self._made[key] = line
        return self._made[key]


def _introduce(line: Line) -> None:
    """A number from each rank to the next, and from the last to the first, one after the other.

    With NCCL two ranks are connected at their first message, for which both must be there: the host waits. A pipeline's
    stages would wait for each other, each at a receive whose send comes after it. Collective over the line.
    """
    ranks, index, group = line
    device = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    number = torch.zeros(1, device=device)
    for sender, rank in enumerate(ranks):
        receiver = (sender + 1) % len(ranks)
        if index == sender:
            dist.send(number, ranks[receiver], group=group)
        elif index == receiver:
            dist.recv(number, rank, group=group)


class ParallelContext:
    """The axes of one job on this rank, and its traffic.

    `axis(name)` knows the names in `spec.AXES`, in `JOINED` and in `LINKS`.
    trace: the report lists every collective.
    Raises ValueError when the spec's product is not the number of ranks.
    Use as a context manager; afterwards it has no axes any more.
    """

    def __init__(self, spec: ParallelSpec, groups: GroupCache, *, trace: bool = False) -> None:
        self.spec = spec
        self.rank = groups.rank
        self.world_size = groups.world_size
        self.world = groups.world
        self.traffic = Traffic()
        self._trace = trace
        self._axes = {
            name: Axis(
                name=name,
                ranks=ranks,
                index=index,
                group=group,
                traffic=self.traffic.line(name, ranks),
                is_local=groups.are_local(ranks),
            )
            for name, (ranks, index, group) in groups.lines(spec).lines.items()
        }
        # Groups that are made for a spec's first job are not its work.
        self._begin_s = time.perf_counter()

    def axis(self, name: str) -> Axis:
        return self._axes[name]

    @property
    def lane(self) -> int:
        """Which lane this rank is in: ranks with the same rows to run, numbered dp outermost, then cfg."""
        return self.rank // self._lane_size

    @property
    def _lane_size(self) -> int:
        # dp and cfg are the outermost axes, so a lane's ranks follow one another.
        return self.world_size // (self.spec.dp * self.spec.cfg)

    def begin_evaluation(self, device: torch.device) -> None:
        """A whole run's next evaluation of the model begins on this rank: a trace shows it."""
        if self._trace:
            self.traffic.begin_evaluation(device)

    def report(self) -> dict[str, Any]:
        """The job's account so far, as `traffic.account` describes it. Collective over all ranks."""
        return account(
            self.traffic, self._begin_s, world=self.world, lines=list(self._axes), trace=self._trace
        )

    def __enter__(self) -> ParallelContext:
        reset_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        self._axes.clear()
