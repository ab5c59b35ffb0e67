"""Process groups of the axes: how they are made, kept from job to job, and freed.

Groups are slow to make, and NCCL's take memory of the device. So the worker's service owns a `GroupCache`, which keeps
those of the last jobs. Making and freeing them is collective: every rank asks for the same specs in the same order.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from comfy_xdit.errors import InputError

from .spec import AXES, ParallelSpec

log = logging.getLogger("comfy_xdit")

JOINED = {"lanes": ("dp", "cfg"), "sequence": ("distri", "ring", "ulysses")}
"""Axes made of others, outermost first: rows are dealt over "lanes", tokens are cut over "sequence"."""

LINKS = ("pipe odd", "pipe back")
"""The pipe axis again, each with a group of its own: a stage sends and receives at the same time, and what
waits for a peer must not hold up what that peer waits for."""

MAX_KEPT = 8
"""So many groups of a rank are kept, and more only where one job needs more: the least recently used go first.
A job of pipe, cfg and ulysses has five."""

MAX_TRIES, CONNECT_TIMEOUT_S = 3, 60.0
"""How often groups are made anew when a rank could not connect, and how long it tries: a lost connection leaves its
other end waiting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A rank's line of ranks along one axis: their global ranks in order, its place, and their group; None: alone."""

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None


GROUP_TIMEOUT_S = 1800.0
"""torch's own last resort for a message; the coordinator ends silent workers, and a client slow ones, before that."""

Key = tuple[str, tuple[tuple[int, ...], ...]]
"""What groups are for ("pipe" or one of `LINKS`, where they are nobody else's; `WORLD`, or ""), the lines of ranks."""

WORLD = "world"
"""The group of all ranks, which is there from the start."""


class GroupCache:
    """Process groups of the specs used last; specs whose axes cut the ranks alike share them.

    world_size: how many ranks there are; with 1, torch.distributed need not be initialised. num_local: how many of
    them each machine has, numbered machine after machine; None: all.

    After a failure: call `begin_job` before each job and `fail` when it raised (a `ParallelContext` does both), then
    ask `has_communicated`. False: this rank took part in no message of the job, so the groups are as they were. True:
    a peer may wait for a message of this rank, or one be on its way to it, which a later job would take for its own.
    Then no group of this process may be used again, and `begin_job` raises RuntimeError: only a new process helps.
    That a rank sent nothing says nothing about the others: unless every rank failed before its first message, and
    that is what input that is no good does, they wait for this one.
    """

    def __init__(self, world_size: int, num_local: int | None = None) -> None:
        self.world_size = world_size
        self.num_local = num_local or world_size
        self.has_communicated = False
        self._is_broken = False
        # In the order of their last use.
        self._kept: dict[Key, Line] = {}

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.world_size > 1 else 0

    @property
    def world(self) -> dist.ProcessGroup | None:
        """The group of all ranks, for a message; None when there is only one."""
        return self.used(self._world)

    @property
    def _world(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    def begin_job(self) -> None:
        """A job begins, which has sent nothing yet. Raises RuntimeError after one that failed in mid-message."""
        self._check()
        self.has_communicated = False

    def fail(self) -> None:
        """The job raised an error."""
        self._is_broken = self.has_communicated

    def used(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """The group, for a message."""
        self._check()
        self.has_communicated |= group is not None
        return group

    def _check(self) -> None:
        if self._is_broken:
            raise RuntimeError("a job failed after its first message to other ranks; this process must be restarted")

    def are_local(self, ranks: Sequence[int]) -> bool:
        """Whether they are all on one machine."""
        return len({rank // self.num_local for rank in ranks}) == 1

    def lines(self, spec: ParallelSpec) -> dict[str, Line]:
        """Axis → this rank's line; names as in `AXES`, `JOINED` and `LINKS`.

        Collective over all ranks. Raises InputError when the spec's product is not the number of ranks, RuntimeError,
        on every rank, when some could not be connected.
        """
        if spec.num_ranks != self.world_size:
            raise InputError(
                f"{spec} does not fit a pool of {self.world_size}; "
                f"use degrees whose product is {self.world_size}"
            )
        self._check()
        keys = _keys(spec)
        missing = [key for key in dict.fromkeys(keys.values()) if key not in self._kept and key[0] != WORLD]
        idle = [key for key in self._kept if key not in keys.values()]
        self._free(idle[: max(0, len(self._kept) + len(missing) - MAX_KEPT)])
        for key in missing:
            self._kept[key] = self._make(key)
        # The last ones are those used last.
        self._kept |= {key: self._kept.pop(key) for key in keys.values() if key in self._kept}
        alone = Line(ranks=(self.rank,), index=0, group=None)
        return {axis: alone for axis in (*AXES, *JOINED, *LINKS)} | {
            axis: self._line(key) for axis, key in keys.items()
        }

    def make_for_all(self) -> dist.ProcessGroup:
        """A group of all ranks that is nobody else's, until `close`. Collective over all ranks.

        Raises RuntimeError, on every rank, when some could not be connected.
        """
        key: Key = ("", (tuple(range(self.world_size)),))
        self._kept[key] = line = self._make(key)
        assert line.group is not None
        return line.group

    def close(self) -> None:
        """Free all groups. Collective over all ranks."""
        self._free(list(self._kept))

    def _line(self, key: Key) -> Line:
        if key[0] == WORLD:
            return Line(ranks=key[1][0], index=self.rank, group=self._world)
        return self._kept[key]

    def _make(self, key: Key) -> Line:
        """This rank's line, and the groups of all lines, once all ranks are connected."""
        self.has_communicated = True
        link, lines = key
        mine = next(number for number, ranks in enumerate(lines) if self.rank in ranks)
        for left in reversed(range(MAX_TRIES)):
            made, error = _try_groups(lines, mine)
            # Nobody uses, or frees, what another may still be connecting to: that would be told "connection closed".
            if not self._meet(error is not None):
                break
            if made is not None:
                dist.destroy_process_group(made)
            log.warning("rank %d: ranks %s could not all be connected (%s)", self.rank, lines, error or "a peer failed")
            if not left:
                raise RuntimeError(f"ranks could not be connected with each other in {MAX_TRIES} tries") from error
        line = Line(ranks=lines[mine], index=lines[mine].index(self.rank), group=made)
        if link:
            _introduce(link, line)
        return line

    def _meet(self, failed: bool = False) -> bool:
        """Whether any rank failed. Collective over all ranks."""
        # On the CPU, where ranks are connected from the start.
        number = torch.tensor([int(failed)])
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._world)
        return bool(number)

    def _free(self, keys: Sequence[Key]) -> None:
        """Collective over all ranks."""
        if not keys:
            return
        # What is under way on a device would be cut off, here or at a peer.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._meet()
        for key in keys:
            dist.destroy_process_group(self._kept.pop(key).group)


def _keys(spec: ParallelSpec) -> dict[str, Key]:
    """Axis → its groups, for all that are of more than one rank, in the order in which they are made."""
    # Axes of degree 1 need no group; leaving them out saves one group a rank for each.
    used = [axis for axis in AXES if getattr(spec, axis) > 1]
    keys = {axis: (axis if axis == "pipe" else "", _lines(spec, [axis])) for axis in used}
    for name, axes in JOINED.items():
        found = [axis for axis in axes if axis in used]
        if found:
            lines = _lines(spec, found)
            # A single axis of all ranks has a group of its own: its messages, which may be under way for long, must not
            # hold up what ranks agree on in the world's.
            keys[name] = (WORLD if len(found) > 1 and len(lines) == 1 else "", lines)
    return keys | {name: (name, _lines(spec, ["pipe"])) for name in LINKS if spec.pipe > 1}


def _lines(spec: ParallelSpec, axes: list[str]) -> tuple[tuple[int, ...], ...]:
    """All ranks, in lines along `axes` (outermost first) as one."""
    grid = torch.arange(spec.num_ranks).view(tuple(spec.degrees.values()))
    places = [AXES.index(axis) for axis in axes]
    degree = math.prod(spec.degrees[axis] for axis in axes)
    rows = grid.movedim(places, list(range(-len(axes), 0))).reshape(-1, degree).tolist()
    return tuple(tuple(ranks) for ranks in rows)


def _try_groups(
    lines: Sequence[Sequence[int]], mine: int
) -> tuple[dist.ProcessGroup | None, RuntimeError | None]:
    """The group of line `mine`, or why it could not be made. Every rank makes those of all lines, in one order."""
    made, failure = None, None
    for number, ranks in enumerate(lines):
        try:
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=CONNECT_TIMEOUT_S))
        except RuntimeError as error:
            failure = error
            continue
        if number == mine:
            made = group
    if isinstance(made, dist.ProcessGroup):
        # A message may take longer than a connection.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=GROUP_TIMEOUT_S), made)
    return made, failure


def _introduce(link: str, line: Line) -> None:
    """A number over each connection that a pipeline will use in this group, one after the other.

    With NCCL two ranks are connected at their first message, for which both must be there, and memory of the device is
    taken, which may wait for all that runs there. So not in mid-job, beside receives. Collective over the line.
    """
    device = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    number = torch.zeros(1, device=device)
    last = len(line.ranks) - 1
    pairs = {
        "pipe": [(stage, stage + 1) for stage in range(0, last, 2)],
        "pipe odd": [(stage, stage + 1) for stage in range(1, last, 2)],
        "pipe back": [(last, 0)],
    }
    for sender, receiver in pairs[link]:
        if line.index == sender:
            dist.send(number, line.ranks[receiver], group=line.group)
        elif line.index == receiver:
            dist.recv(number, line.ranks[sender], group=line.group)
