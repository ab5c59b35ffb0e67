"""What one rank sent in one job and how long it took: the account behind a job's report and its trace."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_SKEW_S = 1.0
"""Clocks of one machine agree. Those of two differ by more than this, and are brought together."""

AWAITED, MATCHED, IDLE = 0, 1, 2
"""How a time in a collective is told apart: awaited (begun before, its end waited for), matched with the other
ranks' (who comes early is idle until the last is there), or idle as a whole (nothing to receive yet)."""


EVALUATION = "evaluation"
"""An event without a collective: where one begins on this rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One collective of one rank. line: axis, and the first rank on it; begin, end: of the machine's clock, s."""

    name: str
    line: tuple[str, int]
    begin: float
    end: float
    kind: int
    num_bytes: int


class Traffic:
    """Bytes and times of one rank's job; each axis counts into it through a `LineTraffic`.

    bytes: what leaves this rank, by collective.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._events: list[Event] = []
        self._on_device: list[tuple[Event, Any, Any]] = []
        self._clock: tuple[Any, float] | None = None

    def line(self, axis: str, ranks: Sequence[int]) -> LineTraffic:
        """The counter of one axis."""
        return LineTraffic(self, (axis, ranks[0]))

    def begin_evaluation(self, device: torch.device) -> None:
        """An evaluation of the model begins here."""
        with self.timed(Event(name=EVALUATION, line=("", 0), begin=0.0, end=0.0, kind=AWAITED, num_bytes=0), device):
            pass

    @property
    def events(self) -> list[Event]:
        """All collectives so far, in order; waits for the device."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if self._on_device:
            assert self._clock is not None
            base, base_s = self._clock
            for event, begin, end in self._on_device:
                times = (base_s + base.elapsed_time(mark) / 1000 for mark in (begin, end))
                self._events.append(dataclasses.replace(event, **dict(zip(("begin", "end"), times, strict=True))))
            self._on_device.clear()
        return self._events

    @contextlib.contextmanager
    def timed(self, event: Event, device: torch.device) -> Iterator[None]:
        """Time what runs inside: by the host's clock, on a GPU by its stream's."""
        if device.type == "cuda":
            if self._clock is None:
                # The stream's times count from an event whose place on the host's clock is known.
                torch.cuda.current_stream(device).synchronize()
                self._clock = _mark(), time.perf_counter()
            begin = _mark()
            yield
            self._on_device.append((event, begin, _mark()))
        else:
            begin_s = time.perf_counter()
            yield
            self._events.append(dataclasses.replace(event, begin=begin_s, end=time.perf_counter()))


class LineTraffic:
    """What goes over one axis' line of ranks."""

    def __init__(self, traffic: Traffic, line: tuple[str, int]) -> None:
        self._traffic = traffic
        self._line = line

    @property
    def bytes(self) -> Counter[str]:
        return self._traffic.bytes

    @contextlib.contextmanager
    def timed(self, collective: str, num_bytes: int, device: torch.device) -> Iterator[None]:
        """Count a collective that runs inside the `with`; 0 bytes: waits for the end of one that is counted."""
        self.bytes[collective] += num_bytes
        # What waits for a neighbour's tensor waits for the neighbour, which is behind.
        late = IDLE if collective == "p2p" else AWAITED
        kind = MATCHED if num_bytes else late
        event = Event(name=collective, line=self._line, begin=0.0, end=0.0, kind=kind, num_bytes=num_bytes)
        with self._traffic.timed(event, device):
            yield


def account(
    traffic: Traffic, begin_s: float, *, world: dist.ProcessGroup | None, lines: Sequence[str], trace: bool
) -> dict[str, Any]:
    """A job's report: this rank's numbers, and under "ranks" those of all.

    Each has seconds (wall), compute_seconds, communication_seconds, idle_seconds (waiting for other ranks),
    peak_bytes (of the device, or of the process on a CPU; None where it isn't known). bytes_sent is this rank's, and
    so are with `trace` began, evaluations [begin, ...] and events [[name, axis, begin, end, bytes], ...]: by
    rank 0's clock, in seconds.
    lines: the names of all axes. Collective over `world`.
    """
    events = [event for event in traffic.events if event.name != EVALUATION]
    end_s = time.perf_counter()
    rows = [[lines.index(e.line[0]) * 2**20 + e.line[1], e.kind, e.begin, e.end] for e in events]
    peak = peak_bytes()
    head = [begin_s, end_s, -1.0 if peak is None else float(peak), float(len(rows))]
    heads, tables, ahead = _gathered(head, rows, world)
    ranks = []
    for place, ((begin, end, held, _), table) in enumerate(zip(heads.tolist(), tables, strict=True)):
        idle = idle_seconds(tables, place)
        inside = float((table[:, 3] - table[:, 2]).sum())
        ranks.append(
            {
                "seconds": end - begin,
                "compute_seconds": max(0.0, end - begin - inside),
                "communication_seconds": max(0.0, inside - idle),
                "idle_seconds": idle,
                "peak_bytes": None if held < 0 else int(held),
            }
        )
    own = 0 if world is None else world.rank()
    report = {**ranks[own], "bytes_sent": dict(traffic.bytes), "ranks": ranks}
    if trace:
        report["began"] = begin_s + ahead
        report["evaluations"] = [event.begin + ahead for event in traffic.events if event.name == EVALUATION]
        report["events"] = [[e.name, e.line[0], e.begin + ahead, e.end + ahead, e.num_bytes] for e in events]
    return report


def reset_peak() -> None:
    """Begin to look for the peak anew."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Not everywhere allowed; the peak is then the process's since its start.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Most bytes since `reset_peak`: of the device's tensors, or the process's resident set (Linux)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _gathered(
    head: list[float], rows: list[list[float]], world: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor], float]:
    """Every rank's head and table, their times brought to this machine's clock; and how far rank 0's is ahead of it."""
    own = torch.tensor(head, dtype=torch.float64)
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 4)
    if world is None:
        return own[None], [table], 0.0
    heads = own.new_empty((dist.get_world_size(world), len(head)))
    dist.all_gather(list(heads.unbind(0)), own, group=world)
    # All leave the all-gather at one time, more or less.
    now = own.new_tensor([time.perf_counter()])
    padded = own.new_zeros((int(heads[:, 3].max()) * 4 + 1,))
    padded[0] = now
    padded[1 : 1 + table.numel()] = table.flatten()
    whole = padded.new_empty((len(heads), padded.numel()))
    dist.all_gather(list(whole.unbind(0)), padded, group=world)
    clocks = whole[:, 0] - now
    skews = torch.where(clocks.abs() > MAX_SKEW_S, clocks, torch.zeros_like(clocks))
    tables = []
    for rank, skew in enumerate(skews.tolist()):
        length = int(heads[rank, 3])
        found = whole[rank, 1 : 1 + 4 * length].view(length, 4)
        found[:, 2:] -= skew
        tables.append(found)
    return heads, tables, float(skews[0])


def idle_seconds(tables: list[Tensor], place: int) -> float:
    """Seconds in which the rank at `place` waited for others to come.

    tables: of each rank, its collectives in order: line, kind, begin and end.
    """
    own = tables[place]
    idle = float((own[:, 3] - own[:, 2])[own[:, 1] == IDLE].sum())
    for line in own[own[:, 1] == MATCHED, 0].unique().tolist():
        found = [table[(table[:, 0] == line) & (table[:, 1] == MATCHED)] for table in tables]
        on_line = [table for table in found if len(table)]
        mine = found[place]
        length = min(len(table) for table in on_line)
        latest = torch.stack([table[:length, 2] for table in on_line]).amax(0)
        mine = mine[:length]
        idle += float((latest - mine[:, 2]).clamp(min=0).minimum(mine[:, 3] - mine[:, 2]).sum())
    return idle


def _mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
