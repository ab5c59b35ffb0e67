"""What becomes of all ranks' records on devices: what differs between ranks, and who waits for whom for ever.

The model is NCCL and CUDA as far as waiting goes, each rule at its strictest:
- A rank has a host, a compute stream and a stream for each communicator. A stream runs in order. An operation of NCCL
  starts when the compute stream has come to where it was launched, and ends when all of its ranks have started theirs:
  nothing is buffered, a posted receive spins.
- Lone sends and receives of two ranks share a communicator of their own, for both directions.
- The first use of a communicator holds the host until all of its ranks are there.
- `eager`: instead of these two, a group has one communicator for all, made with the group: as torch has it where groups
  know their devices.
- `lazy_loading`: the first launch of each kernel holds the host until all of its device's streams are empty.
- `lazy_libraries`: so does, where a library chooses kernels by size, the first launch of each size.
- `held`: at these launches the host waits for the whole device, as in a `cudaFree` of the allocator.
Each rule only ever lets go of somebody, so the order in which ranks are looked at doesn't matter: one replay decides.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Any

from events import Block, Event, Follow, Kernel, Launch, Meet, Met, Wait

Record = Sequence[Event]
Place = tuple[int, int]
"""A rank, and the index of an event in its record."""


def differences(records: Sequence[Record]) -> list[str]:
    """A sentence for each place where ranks don't ask for the same, by group and by pair of ranks; [] is good."""
    found = []
    calls: dict[Any, dict[int, list[tuple[Any, str]]]] = defaultdict(lambda: defaultdict(list))
    members: dict[Any, tuple[int, ...]] = {}
    sent: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
    received: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
    for rank, record in enumerate(records):
        for event in record:
            if not isinstance(event, (Launch, Meet)):
                continue
            hosts = isinstance(event, Meet)
            if hosts or event.kind not in ("p2p", "batch"):
                key = ("hosts" if hosts else "devices", event.group)
                calls[key][rank].append(((event.kind, event.ranks, event.detail), event.where))
                members[key] = event.ranks
            for source, to, *size in () if hosts else event.messages:
                side = sent if source == rank else received
                side[event.group, event.kind, source, to].append((tuple(size), event.where))
                if event.kind == "all_to_all" and source == to:
                    received[event.group, event.kind, source, to].append((tuple(size), event.where))
    for (kind, group), by_rank in calls.items():
        ranks = members[kind, group]
        for rank in ranks[1:]:
            found += _unlike(by_rank[ranks[0]], by_rank[rank], f"{kind} in {group}: ranks {ranks[0]} and {rank}")
    for group, kind, source, to in sorted(sent.keys() | received.keys()):
        if kind == "all_to_all" and source == to:
            continue
        key = (group, kind, source, to)
        found += _unlike(sent[key], received[key], f"{kind} in {group}: what {source} sends and {to} receives")
    return found


def _unlike(ours: list[tuple[Any, str]], theirs: list[tuple[Any, str]], what: str) -> list[str]:
    for number, ((mine, here), (other, there)) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return [f"{what} differ at {number}: {mine} in {here}, {other} in {there}"]
    if len(ours) != len(theirs):
        first = (ours if len(ours) > len(theirs) else theirs)[min(len(ours), len(theirs))]
        return [f"{what} are {len(ours)} and {len(theirs)}; the first without its like is {first[0]} in {first[1]}"]
    return []


def brief(record: Record) -> list[Event]:
    """The record with one kernel for each run of kernels: the host that waits at one of them waits for the same."""
    found: list[Event] = []
    for event in record:
        if isinstance(event, Kernel) and found and isinstance(found[-1], Kernel):
            before = found[-1]
            is_new_size = before.is_new_size or event.is_new_size
            found[-1] = Kernel(before.name, before.is_first or event.is_first, is_new_size)
        elif not isinstance(event, Block):
            found.append(event)
    return found


def launches(records: Sequence[Record]) -> list[Place]:
    """Where a host launches a kernel: where a `held` wait may fall."""
    return [
        (rank, index)
        for rank, record in enumerate(records)
        for index, event in enumerate(record)
        if isinstance(event, Kernel)
    ]


def stuck(
    records: Sequence[Record],
    *,
    lazy_loading: bool = False,
    lazy_libraries: bool = False,
    eager: bool = False,
    held: Iterable[Place] = (),
) -> dict[int, str]:
    """Who never comes to the end of its record, and where its host is then; {} when all do."""
    waits = set(held)
    for rank, record in enumerate(records):
        for index, event in enumerate(record):
            if isinstance(event, Kernel) and (
                (lazy_loading and event.is_first) or (lazy_libraries and event.is_new_size)
            ):
                waits.add((rank, index))
    return _Replay(records, eager, frozenset(waits)).run()


class _Rank:
    """A rank in the replay. streams: name → what is left to run; done, ready: numbers of NCCL's operations."""

    def __init__(self, rank: int, record: Record) -> None:
        self.rank, self.record = rank, record
        self.next = 0
        self.streams: dict[Any, deque[Any]] = defaultdict(deque)
        self.ready: set[int] = set()
        self.done: set[int] = set()
        self.known: set[Any] = set()
        self.counts: dict[Any, int] = defaultdict(int)
        self.arrived: dict[int, Any] = {}

    @property
    def is_idle(self) -> bool:
        return not any(self.streams.values())


class _Replay:
    def __init__(self, records: Sequence[Record], eager: bool, held: frozenset[Place]) -> None:
        self._ranks = [_Rank(rank, record) for rank, record in enumerate(records)]
        self._eager, self._held = eager, held
        self._there: dict[Any, set[int]] = defaultdict(set)
        self._started: dict[Any, set[int]] = defaultdict(set)

    def run(self) -> dict[int, str]:
        moved = True
        while moved:
            moved = False
            for rank in self._ranks:
                while self._host(rank):
                    moved = True
                moved |= self._device(rank)
        return {
            rank.rank: str(rank.record[rank.next]) if rank.next < len(rank.record) else "at its end"
            for rank in self._ranks
            if rank.next < len(rank.record) or not rank.is_idle
        }

    def _host(self, rank: _Rank) -> bool:
        """One event of the host; False when it has to wait."""
        if rank.next >= len(rank.record):
            return False
        event = rank.record[rank.next]
        if self._held and (rank.rank, rank.next) in self._held and not rank.is_idle:
            return False
        if not self._may(rank, event):
            return False
        rank.next += 1
        return True

    def _may(self, rank: _Rank, event: Event) -> bool:
        # A kernel runs when its turn comes, which is at once: only what it stands behind counts.
        if isinstance(event, Wait):
            return rank.is_idle if event.for_all else not rank.streams["compute"]
        if isinstance(event, Meet):
            key = ("hosts", event.group, rank.counts["hosts", event.group])
            rank.counts["hosts", event.group] += 1
            self._there[key].add(rank.rank)
            rank.arrived[event.number] = (key, set(event.ranks))
        elif isinstance(event, Met):
            key, wanted = rank.arrived[event.number]
            return wanted <= self._there[key]
        elif isinstance(event, Launch):
            return self._launch(rank, event)
        elif isinstance(event, Follow) and event.number not in rank.done:
            rank.streams["compute"].append(event.number)
        return True

    def _launch(self, rank: _Rank, event: Launch) -> bool:
        pair = {event.messages[0][0], event.messages[0][1]} if event.kind == "p2p" and not self._eager else None
        members = pair or set(event.ranks)
        communicator = (event.group, tuple(sorted(members)) if pair else "all")
        if communicator not in rank.known and not self._eager:
            self._there["communicator", communicator].add(rank.rank)
            if not members <= self._there["communicator", communicator]:
                return False
            rank.known.add(communicator)
        parts = []
        if event.messages and event.kind in ("p2p", "batch"):
            for source, to, *_ in event.messages:
                name = (communicator, source, to)
                parts.append(((name, rank.counts[name]), {source, to}))
                rank.counts[name] += 1
        else:
            parts.append(((communicator, rank.counts[communicator]), members))
            rank.counts[communicator] += 1
        rank.streams["compute"].append(-event.number)
        rank.streams[communicator].append((event.number, parts))
        return True

    def _device(self, rank: _Rank) -> bool:
        """All that the rank's streams can do now."""
        moved, again = False, True
        while again:
            again = False
            compute = rank.streams["compute"]
            while compute and (compute[0] < 0 or compute[0] in rank.done):
                number = compute.popleft()
                if number < 0:
                    rank.ready.add(-number)
                again = True
            for name, stream in rank.streams.items():
                if name == "compute" or not stream or stream[0][0] not in rank.ready:
                    continue
                number, parts = stream[0]
                for key, _ in parts:
                    if rank.rank not in self._started[key]:
                        self._started[key].add(rank.rank)
                        again = True
                if all(wanted <= self._started[key] for key, wanted in parts):
                    stream.popleft()
                    rank.done.add(number)
                    again = True
            moved |= again
        return moved
