"""Ranks agree on whether to go on: nobody stops alone, or its peers would wait for it in a collective."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist


class Agreement:
    """Asked once a step by every rank, in the same order: all get the same answer.

    wish_to_stop: this rank's own view, read at each step. group: all ranks; None when alone.
    lag: the answer at a step is what ranks wished that many steps before, so that a pipeline whose
    stages are up to `lag` steps apart need not drain to agree.
    """

    def __init__(self, wish_to_stop: Callable[[], bool], group: dist.ProcessGroup | None, *, lag: int = 0) -> None:
        self._wish_to_stop = wish_to_stop
        self._group = group
        self._lag = lag
        self._pending: deque[tuple[torch.Tensor, dist.Work | None]] = deque()

    def go_on(self) -> bool:
        """Whether to run the next step. Collective over the group."""
        # On the CPU whatever the device: the host must know, and should not wait for the GPU's queue.
        wishes = torch.tensor([int(self._wish_to_stop())])
        work = None
        if self._group is not None:
            work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending.append((wishes, work))
        if len(self._pending) <= self._lag:
            return True
        agreed, work = self._pending.popleft()
        if work is not None:
            work.wait()
        return not agreed.item()

    def close(self) -> None:
        """Wait for what is under way. Every rank must have asked equally often."""
        for _, work in self._pending:
            if work is not None:
                work.wait()
        self._pending.clear()
