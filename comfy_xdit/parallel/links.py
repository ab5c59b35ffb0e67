"""Messages from one stage of a pipeline to the next, while both compute.

With NCCL a receive that was posted is a kernel that spins until its sender comes. Meanwhile anything that waits for
the whole device (the first launch of a kernel, the allocator freeing its cache) waits for the sender too. So a receive
is posted only when all that its sender needs of this rank is launched: then it ends whatever this rank waits for.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .context import Axis


class Outbox:
    """Sends tensors to one rank of an axis, in order. A tensor must not be written to before it has arrived."""

    def __init__(self, axis: Axis, to: int) -> None:
        self._axis = axis
        self._to = axis.ranks[to]
        self._new: list[tuple[dist.Work, Tensor]] = []
        self._old: list[tuple[dist.Work, Tensor]] = []

    def send(self, x: Tensor) -> None:
        """Nothing is sent for a tensor without elements."""
        if x.numel():
            x = x.contiguous()
            self._axis.traffic.bytes["p2p"] += x.nbytes
            work = dist.isend(x, self._to, group=self._axis.group)
            assert work is not None
            self._new.append((work, x))

    def settle(self) -> None:
        """Let go of what was sent before the last call of this; waits for it to arrive."""
        for work, _ in self._old:
            work.wait()
        self._old, self._new = self._new, []


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Expected:
    """A tensor that will be sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Inbox:
    """Receives tensors from one rank of an axis, in the order in which it sends them."""

    def __init__(self, axis: Axis, source: int) -> None:
        self._axis = axis
        self._source = axis.ranks[source]
        self._expected: deque[_Expected] = deque()
        self._coming: deque[tuple[dist.Work | None, Tensor]] = deque()

    def expect(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """The tensor that will be sent after all that were expected before is like this."""
        self._expected.append(_Expected(shape=tuple(shape), dtype=dtype, device=device))

    def post(self, num: int | None = None) -> None:
        """Receive the next `num` (None: all) that are expected, while this rank computes.

        All that their sender needs of this rank must be launched.
        """
        for _ in range(len(self._expected) if num is None else num):
            like = self._expected.popleft()
            x = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            work = dist.irecv(x, self._source, group=self._axis.group) if x.numel() else None
            self._coming.append((work, x))

    def take(self) -> Tensor:
        """The first tensor that is expected; waits for it."""
        if not self._coming:
            self.post(1)
        work, x = self._coming.popleft()
        if work is not None:
            with self._axis.traffic.timed("p2p", 0, x.device):
                work.wait()
        return x


class Shelf:
    """Both ends of a link from a stage to itself, in a pipeline of one."""

    def __init__(self) -> None:
        self._tensors: deque[Tensor] = deque()

    def send(self, x: Tensor) -> None:
        self._tensors.append(x)

    def settle(self) -> None:
        pass

    def expect(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        pass

    def post(self, num: int | None = None) -> None:
        pass

    def take(self) -> Tensor:
        return self._tensors.popleft()
