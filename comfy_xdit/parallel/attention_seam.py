"""Where the engine gets hold of one attention module's calls, by whichever of three ways they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .function_seam import Receive, receive
from .seam import Seam
from .tokens import Attention

if TYPE_CHECKING:
    from .whole_shaped import WholeShaped


class AttentionSeam(Seam):
    """One attention module's way to the engine; it is held to ask as often as its plan says (see `Seam`)."""

    def __init__(self, path: str, rule: Attention, engine: WholeShaped) -> None:
        super().__init__(path, rule.streams, 1 + len(rule.then), self._from_torch)
        self.rule = rule
        self.engine = engine
        self._before: Receive | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        if not self.engine.in_block:
            raise RuntimeError(f"attention of {self.path} runs outside of the plan's blocks")
        self._asked = 0
        self.engine.running.append(self)
        if self.rule.is_torchs:
            super().enter(module, args)
        elif self.is_called:
            self._before = receive(self.engine.attend)
            self._open = True

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.engine.running and self.engine.running[-1] is self:
            self.engine.running.pop()
        if self.rule.or_fewer and 0 < self._asked < self._num_calls:
            self._asked = self._num_calls
        super().leave(module, args, out)

    @property
    def is_called(self) -> bool:
        """Whether the class calls its attention by a name of its own."""
        return self.rule.seam != "override" and not self.rule.is_torchs

    def close(self) -> None:
        if self.is_called and self._open:
            self._open = False
            receive(self._before)
        else:
            super().close()

    def settle(self) -> None:
        """As a seam's, with two differences.

        A list of blocks may run several times in a forward, once for each of several hints; and where there are no
        queries or no keys (a video without sound), nothing has to run.
        """
        sides = self.rule.streams, self.rule.keys or self.rule.streams
        known = self.engine.shards.lengths
        is_needed = all(any(known.get(stream) != 0 for stream in side) for side in sides)
        self.num_runs = min(self.num_runs, 1) if is_needed else 1
        super().settle()

    def count(self) -> None:
        """A call has come by the override."""
        self._asked += 1

    @property
    def call(self) -> str:
        """A name for the call that has just come: the path, and which of several it is."""
        return self.path if self._asked == 1 else f"{self.path}, call {self._asked}"

    def streams(self) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Of the queries of the call that has just come; and of its keys, where they are others."""
        if self._asked == 1:
            return self.rule.streams, self.rule.keys
        if self._asked > self._num_calls:
            raise self._miscounted()
        return self.rule.then[self._asked - 2], None

    def _from_torch(self, path: str, streams: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        return self.engine.ask(self, q, k, v, **more)
