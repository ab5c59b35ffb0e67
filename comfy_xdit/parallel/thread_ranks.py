"""Ranks as threads of one process: the collectives of all methods without other processes, ports or devices.

For a check of a small model on a CPU. A rank that fails ends the others' waiting at once, so nothing hangs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future, collect_all

from .context import ParallelContext
from .groups import GroupCache, Key, Line
from .spec import ParallelSpec

T = TypeVar("T")


def on_threads(spec: ParallelSpec, work: Callable[[ParallelContext], T]) -> list[T]:
    """What `work` returns on each rank of `spec`, rank after rank.

    Every rank is a new thread: what torch keeps for a thread, as its inference mode, `work` sets anew. Raises what the
    first rank that failed raised; the others end at their next message.
    """
    meeting = _Meeting(spec.num_ranks)
    found: dict[int, T] = {}

    def run(rank: int) -> None:
        try:
            with ParallelContext(spec, _Groups(meeting, rank)) as context:
                found[rank] = work(context)
        except BaseException as error:
            meeting.fail(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(spec.num_ranks)]
    with meeting.known():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if meeting.error is not None:
        raise meeting.error
    return [found[rank] for rank in range(spec.num_ranks)]


class _Ended(Exception):
    """Another rank failed."""


class _Meeting:
    """Where the ranks' messages lie, by (group, kind, number, sender, receiver)."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.error: BaseException | None = None
        self._news = threading.Condition()
        self._messages: dict[Any, Tensor] = {}
        self._awaited: dict[Any, Future[Tensor]] = {}
        self._groups: list[_Group] = []

    def put(self, key: Any, x: Tensor) -> None:
        with self._news:
            arrives = self._awaited.pop(key, None)
            if arrives is None:
                self._messages[key] = x
            self._news.notify_all()
        if arrives is not None:
            arrives.set_result(x)

    def take(self, key: Any) -> Tensor:
        """The message, once it is there."""
        with self._news:
            self._news.wait_for(lambda: self.error is not None or key in self._messages)
            if key not in self._messages:
                raise _Ended
            return self._messages.pop(key)

    def coming(self, key: Any) -> Future[Tensor]:
        """The message, which need not be there yet."""
        arrives: Future[Tensor] = Future()
        with self._news:
            if self.error is not None:
                raise _Ended
            if key not in self._messages:
                self._awaited[key] = arrives
                return arrives
            arrives.set_result(self._messages.pop(key))
        return arrives

    def fail(self, error: BaseException) -> None:
        with self._news:
            self.error = self.error or error
            left, self._awaited = self._awaited, {}
            self._news.notify_all()
        for arrives in left.values():
            arrives.set_exception(_Ended())  # type: ignore[arg-type]

    def group(self, ranks: tuple[int, ...], rank: int) -> _Group:
        group = _Group(self, ranks, ranks.index(rank))
        with self._news:
            self._groups.append(group)
            # torch looks a group's ranks up here before a send, and offers no other way to say them.
            dist.distributed_c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
            dist.distributed_c10d._world.pg_map[group] = ("threads", None)  # type: ignore[assignment]
        return group

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """torch knows the groups of this meeting inside the `with`."""
        try:
            yield
        finally:
            for group in self._groups:
                dist.distributed_c10d._world.pg_group_ranks.pop(group, None)
                dist.distributed_c10d._world.pg_map.pop(group, None)


class _Groups(GroupCache):
    """A rank's groups of threads."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        super().__init__(meeting.num_ranks)
        self._meeting = meeting
        self._own_rank = rank
        self._everybody = self._make(("world", (tuple(range(meeting.num_ranks)),)))

    @property
    def rank(self) -> int:
        return self._own_rank

    @property
    def _world(self) -> dist.ProcessGroup | None:
        return self._everybody.group

    def _make(self, key: Key) -> Line:
        ranks = next(ranks for ranks in key[1] if self._own_rank in ranks)
        group = self._meeting.group(ranks, self._own_rank)
        return Line(ranks=ranks, index=ranks.index(self._own_rank), group=group)


class _Group(dist.ProcessGroup):
    """A rank's end of a group, with the calls that the methods make of it."""

    def __init__(self, meeting: _Meeting, ranks: tuple[int, ...], place: int) -> None:
        super().__init__(place, len(ranks))  # type: ignore[call-arg]
        self._meeting = meeting
        self._ranks = ranks
        self._place = place
        self._numbers: dict[tuple[str, int, int], int] = {}

    def _get_backend(self, device: torch.device) -> Any:
        # What torch asks before it sends and receives several messages at once.
        return self

    def _put(self, kind: str, place: int, x: Tensor) -> None:
        # A copy: the sender may use its memory again before it is read.
        self._meeting.put((*self._next(kind, place, 0), self._place, place), x.clone())

    def _coming(self, kind: str, place: int) -> Any:
        """The key of the next message of its kind from `place`."""
        return (*self._next(kind, place, 1), place, self._place)

    def _next(self, kind: str, place: int, way: int) -> tuple[tuple[int, ...], str, int]:
        number = self._numbers[kind, place, way] = self._numbers.get((kind, place, way), 0) + 1
        return self._ranks, kind, number

    def _swap(self, kind: str, parts: list[Tensor]) -> list[Tensor]:
        """parts: for each rank of the group. Returns what each has for this one."""
        for place, part in enumerate(parts):
            self._put(kind, place, part)
        return [self._meeting.take(self._coming(kind, place)) for place in range(len(parts))]

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], *options: Any
    ) -> dist.Work:
        for own, came in zip(outputs[0], self._swap("gather", [inputs[0]] * len(self._ranks)), strict=True):
            own.copy_(came)
        return _done()

    def alltoall_base(self, output: Tensor, input: Tensor, received: Any, sent: list[int], *options: Any) -> dist.Work:
        output.copy_(torch.cat(self._swap("all to all", list(input.split(sent)))))
        return _done()

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        """Nobody waits before the work is waited for: a pipeline's stages agree beside other messages."""
        (x,), is_sum = tensors, options.reduceOp == dist.ReduceOp.SUM
        assert is_sum or options.reduceOp == dist.ReduceOp.MAX, "nothing else is asked for"
        for place in range(len(self._ranks)):
            self._put("reduce", place, x)
        coming = [self._meeting.coming(self._coming("reduce", place)) for place in range(len(self._ranks))]

        def reduced(done: Future[list[Future[Tensor]]]) -> Tensor:
            # In the same order on all ranks.
            parts = torch.stack([each.value() for each in done.value()])
            return x.copy_(parts.sum(0) if is_sum else parts.amax(0))

        return _create_work_from_future(collect_all(coming).then(reduced))

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        (x,) = tensors
        for place in range(len(self._ranks)) if options.rootRank == self._place else ():
            self._put("broadcast", place, x)
        x.copy_(self._meeting.take(self._coming("broadcast", options.rootRank)))
        return _done()

    def send(self, tensors: list[Tensor], place: int, tag: int = 0) -> dist.Work:
        self._put("send", place, tensors[0])
        return _done()

    def recv(self, tensors: list[Tensor], place: int, tag: int = 0) -> dist.Work:
        arrives = self._meeting.coming(self._coming("send", place))
        return _create_work_from_future(arrives.then(lambda done: tensors[0].copy_(done.value())))


def _done() -> dist.Work:
    future: Future[None] = Future()
    future.set_result(None)
    return _create_work_from_future(future)
