"""Where the engine gets hold of a model's attention, and how it knows that none went past it.

A plan names the way (`tokens.Attention`). ComfyUI's models call an override that they are given, or a function by a
name of their own (`function_seam.py`). Others end up at `F.scaled_dot_product_attention`, as every diffusers model does
if its attention back end is torch's own: there a torch function mode takes its place, which is on only in this thread
and only while one of the plan's attention modules runs, so nothing is patched and nothing is left behind. A module that
attended in another way would see the tokens of its own rank only: numbers that look right and are not. So each is held
to ask as often as its plan says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .function_seam import Receive, receive
from .tokens import Attention

if TYPE_CHECKING:
    from .whole_shaped import WholeShaped


@contextlib.contextmanager
def torchs_own(module: nn.Module) -> Iterator[None]:
    """Inside the `with` diffusers' attention goes to torch's function, whatever back end the environment or a processor
    names."""
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    native = AttentionBackendName.NATIVE
    processors: list[Any] = [getattr(child, "processor", None) for child in module.modules()]
    named = [processor for processor in processors if getattr(processor, "_attention_backend", native) is not native]
    before = [processor._attention_backend for processor in named]
    with attention_backend(native):
        for processor in named:
            processor._attention_backend = native
        try:
            yield
        finally:
            for processor, backend in zip(named, before, strict=True):
                processor._attention_backend = backend


class AttentionSeam(TorchFunctionMode):
    """One attention module's way to the engine.

    num_runs: how often the module ran since the last `settle`.
    """

    def __init__(self, path: str, rule: Attention, engine: WholeShaped) -> None:
        super().__init__()
        self.path = path
        self.rule = rule
        self.engine = engine
        self.num_runs = 0
        self._num_calls = 1 + len(rule.then)
        self._asked = 0
        self._open = False
        self._before: Receive | None = None

    @property
    def is_called(self) -> bool:
        """Whether the class calls its attention by a name of its own."""
        return self.rule.seam != "override" and not self.rule.is_torchs

    def enter(self, module: nn.Module, args: Any) -> None:
        """The module begins."""
        if not self.engine.in_block:
            raise RuntimeError(f"attention of {self.path} runs outside of the plan's blocks")
        self._asked = 0
        self.engine.running.append(self)
        if self.rule.is_torchs:
            self.__enter__()
        elif self.is_called:
            self._before = receive(self.engine.attend)
        self._open = True

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """The module has ended; out: None after an error.

        Raises RuntimeError when its attention went past the engine.
        """
        if self.engine.running and self.engine.running[-1] is self:
            self.engine.running.pop()
        if self.rule.or_fewer and 0 < self._asked < self._num_calls:
            self._asked = self._num_calls
        self.close()
        if out is None:
            return
        self.num_runs += 1
        if self._asked != self._num_calls:
            raise self._miscounted()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        if self.rule.is_torchs:
            self.__exit__(None, None, None)
        elif self.is_called:
            receive(self._before)

    def settle(self) -> None:
        """A forward of the model is over.

        Raises RuntimeError unless the module ran in it. A list of blocks may run several times, once for each of
        several hints; and where there are no queries or no keys (a video without sound), nothing has to run.
        """
        sides = self.rule.streams, self.rule.keys or self.rule.streams
        known = self.engine.shards.lengths
        is_needed = all(any(known.get(stream) != 0 for stream in side) for side in sides)
        num_runs, self.num_runs = self.num_runs, 0
        if is_needed and not num_runs:
            raise RuntimeError(f"attention of {self.path} went past the engine: it ran {num_runs} times in a forward")

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

    def _miscounted(self) -> RuntimeError:
        return RuntimeError(
            f"attention of {self.path} went past the engine: {self._asked} calls reached it, not {self._num_calls}"
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self._asked += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert dropout_p == 0 and not is_causal, f"{self.path}: no dropout, no causal attention here"
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        return self.engine.ask(self, query, key, value, mask=attn_mask, scale=scale)
