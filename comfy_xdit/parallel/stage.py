"""A model's forward of which only one stage's blocks run here: streams come from one rank and go to the next.

The model's own forward runs on every stage. What the block before the stage's first gives arrives, so the model's code
between blocks runs where it is needed; and after the stage's last block the forward ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .context import ParallelContext
from .links import Inbox, Outbox

Made = TypeVar("Made")


class Stage:
    """This rank's stage on the pipe axis of `context`.

    Its messages are in order: each `forward` but the first stage's takes one, each but the last's sends one. The
    model's hooks (`stage_blocks.py`) call `receive` and `leave`.
    """

    def __init__(self, context: ParallelContext) -> None:
        self.axis = axis = context.axis("pipe")
        self.is_first = axis.index == 0
        self.is_last = axis.index == axis.degree - 1
        # Neighbouring links have different groups, so a stage's sends and receives never wait for each other.
        links = [context.axis(name) for name in ("pipe", "pipe odd")]
        self._inbox = None if self.is_first else Inbox(links[(axis.index - 1) % 2], axis.index - 1)
        self._outbox = None if self.is_last else Outbox(links[axis.index % 2], axis.index + 1)
        self._num_expected = 0

    def expect(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """A message of `numel` numbers comes next."""
        if self._inbox is not None:
            self._inbox.expect((numel,), dtype, device)
            self._num_expected += 1

    def post(self) -> None:
        """What is expected may come beside other forwards; all that its sender needs of this stage is launched."""
        if self._inbox is not None:
            self._inbox.post()

    def forward(self, run: Callable[[], Made]) -> Made | None:
        """What `run`, which calls the model once, gives on the last stage; None on others."""
        try:
            return run()
        except _Ended:
            return None

    @property
    def ends(self) -> bool:
        """Whether a forward ends after the stage's last block."""
        return not self.is_last

    def settle(self) -> None:
        """Let go of messages sent before the last call of this, which have arrived."""
        if self._outbox is not None:
            self._outbox.settle()

    def receive(self, like: Any) -> Any:
        """What the stage before sent: `like`, which is one stream or several, with the numbers that its block made."""
        assert self._inbox is not None, "nothing comes before the first stage"
        streams = _streams(like)
        sizes = [x.numel() for x in streams]
        if not self._num_expected:
            self.expect(sum(sizes), streams[0].dtype, streams[0].device)
        self._num_expected -= 1
        parts = iter(self._inbox.take().split(sizes))
        if isinstance(like, Tensor):
            return next(parts).view(like.shape)
        return type(like)(x if x is None else next(parts).view(x.shape) for x in like)

    def leave(self, made: Any) -> None:
        """The stage's last block gave `made`. It goes to the next stage, and the forward ends there."""
        if self._outbox is not None:
            self._outbox.send(torch.cat([x.reshape(-1) for x in _streams(made)]))
        if self.ends:
            raise _Ended


def _streams(made: Any) -> list[Tensor]:
    """Those that there are, all of one dtype."""
    found = [x for x in (made if isinstance(made, (tuple, list)) else (made,)) if x is not None]
    dtypes = {x.dtype for x in found}
    assert len(dtypes) == 1, f"one message holds numbers of one type, not of {dtypes}"
    return found


class _Ended(Exception):
    """What follows in the forward is another stage's."""
