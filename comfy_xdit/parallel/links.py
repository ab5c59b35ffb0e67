"""Messages from one stage of a pipeline to the next, while both compute."""

from __future__ import annotations

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


class Inbox:
    """Receives tensors from one rank of an axis, in the order in which it sends them."""

    def __init__(self, axis: Axis, source: int) -> None:
        self._axis = axis
        self._source = axis.ranks[source]
        self._coming: deque[tuple[dist.Work | None, Tensor]] = deque()

    def expect(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """The next tensor that will be sent is like this; it may come while this rank computes."""
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        work = dist.irecv(x, self._source, group=self._axis.group) if x.numel() else None
        self._coming.append((work, x))

    def take(self) -> Tensor:
        """The first tensor that is expected; waits for it."""
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

    def take(self) -> Tensor:
        return self._tensors.popleft()
