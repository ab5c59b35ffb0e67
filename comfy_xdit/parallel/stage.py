"""A model's forward of which only one stage's blocks run here: streams come from one rank and go to the next.

The model's own forward runs on every stage; what other stages' blocks would compute arrives by hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .context import ParallelContext
from .links import Inbox, Outbox
from .model import Model
from .stages import by_name

if TYPE_CHECKING:
    from comfy_xdit.models.base import Family


class PipelineModel(Model, Protocol):
    """A model of which this rank holds the blocks `stage`, numbered as in `block_paths`; others are `Absent`."""

    @property
    def family(self) -> Family: ...
    @property
    def stage(self) -> range: ...
    @property
    def block_paths(self) -> list[str]: ...


class Stage:
    """Runs `model`'s forward on the pipe axis of `context` inside a `with`.

    A stage's messages are in order: each `forward` but the first stage's takes one, each but the last's sends one.
    """

    def __init__(self, model: PipelineModel, context: ParallelContext) -> None:
        axis = context.axis("pipe")
        self.is_first = axis.index == 0
        self.is_last = axis.index == axis.degree - 1
        self._model = model
        self._streams = model.family.plan.streams
        # Neighbouring links have different groups, so a stage's sends and receives never wait for each other.
        links = [context.axis(name) for name in ("pipe", "pipe odd")]
        self._inbox = None if self.is_first else Inbox(links[(axis.index - 1) % 2], axis.index - 1)
        self._outbox = None if self.is_last else Outbox(links[axis.index % 2], axis.index + 1)
        self._num_expected = 0
        self._wants_output = True
        self._handles: list[RemovableHandle] = []

    def expect(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """A message of `numel` numbers comes next."""
        if self._inbox is not None:
            self._inbox.expect((numel,), dtype, device)
            self._num_expected += 1

    def post(self) -> None:
        """What is expected may come beside other forwards; all that its sender needs of this stage is launched."""
        if self._inbox is not None:
            self._inbox.post()

    def forward(self, arguments: Mapping[str, Any], *, wants_output: bool = True) -> Tensor | None:
        """The model's output on the last stage, where wanted; None otherwise."""
        self._wants_output = wants_output
        try:
            return self._model.module(**arguments, return_dict=False)[0]
        except _Ended:
            return None

    def settle(self) -> None:
        """Let go of messages sent before the last call of this, which have arrived."""
        if self._outbox is not None:
            self._outbox.settle()

    def __enter__(self) -> Stage:
        paths = self._model.block_paths
        own = [self._model.module.get_submodule(paths[number]) for number in self._model.stage]
        self._handles = [
            own[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            own[-1].register_forward_hook(self._leave),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inbox is None:
            return args, kwargs
        given = by_name(self._streams, args, kwargs)
        # Other stages' blocks let the embedded streams through: they have the shapes of what comes.
        embedded = [given[name] for name in self._streams]
        sizes = [x.numel() for x in embedded]
        if not self._num_expected:
            self.expect(sum(sizes), embedded[0].dtype, embedded[0].device)
        self._num_expected -= 1
        parts = self._inbox.take().split(sizes)
        came = zip(self._streams, parts, embedded, strict=True)
        return (), {**given, **{name: part.view(x.shape) for name, part, x in came}}

    def _leave(self, block: nn.Module, args: tuple[Any, ...], made: Tensor | tuple[Tensor, ...]) -> None:
        if self._outbox is not None:
            streams = made if isinstance(made, tuple) else (made,)
            self._outbox.send(torch.cat([x.reshape(-1) for x in streams]))
        elif self._wants_output:
            return
        raise _Ended


class _Ended(Exception):
    """What follows in the forward is another stage's, or nobody's."""
