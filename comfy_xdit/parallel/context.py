"""The ranks of one job: which axes there are, where this rank stands on them, and what it sent.

A `ParallelContext` is made for each job and dropped at its end; its process groups are kept (`groups.py`).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.distributed as dist

from .groups import GroupCache, Line
from .spec import ParallelSpec
from .traffic import LineTraffic, Traffic, account, reset_peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """This rank's line of ranks along one axis. is_local: all of them are on one machine."""

    name: str
    line: Line
    groups: GroupCache
    traffic: LineTraffic
    is_local: bool = True

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their global ranks in order."""
        return self.line.ranks

    @property
    def index(self) -> int:
        """This rank's place."""
        return self.line.index

    @property
    def degree(self) -> int:
        return len(self.line.ranks)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Their group, for a message; None when this rank is alone."""
        return self.groups.used(self.line.group)

    @property
    def alone(self) -> Axis:
        """An axis of this rank only: nothing is cut or joined on it."""
        line = Line(ranks=(self.ranks[self.index],), index=0, group=None)
        return dataclasses.replace(self, line=line)


class ParallelContext:
    """The axes of one job on this rank, and its traffic.

    `axis(name)` knows the names in `spec.AXES`, and in `groups.JOINED` and `groups.LINKS`.
    trace: the report lists every collective.
    Raises ValueError when the spec's product is not the number of ranks.
    Use as a context manager; afterwards it has no axes any more. After an error `has_communicated` says whether the
    job had sent its first message: then its groups are not used again, see `GroupCache`.
    """

    def __init__(self, spec: ParallelSpec, groups: GroupCache, *, trace: bool = False) -> None:
        self.spec = spec
        self.rank = groups.rank
        self.world_size = groups.world_size
        self.traffic = Traffic()
        self._groups = groups
        self._trace = trace
        lines = groups.lines(spec)
        # What connects ranks for a spec's first job is none of its messages, nor its work.
        groups.begin_job()
        self._begin_s = time.perf_counter()
        self._axes = {
            name: Axis(
                name=name,
                line=line,
                groups=groups,
                traffic=self.traffic.line(name, line.ranks),
                is_local=groups.are_local(line.ranks),
            )
            for name, line in lines.items()
        }

    def axis(self, name: str) -> Axis:
        return self._axes[name]

    @property
    def world(self) -> dist.ProcessGroup | None:
        """The group of all ranks, for a message; None when there is only one."""
        return self._groups.world

    @property
    def has_communicated(self) -> bool:
        """Whether this rank has taken part in a message of the job."""
        return self._groups.has_communicated

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

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._axes.clear()
        if kind is not None:
            self._groups.fail()
