"""Where the engine gets hold of a model's attention, and how it knows that none went past it.

Every diffusers model ends up at `F.scaled_dot_product_attention`, if its attention back end is torch's own. There a
torch function mode takes its place: it is on only in this thread and only while one of the plan's attention modules
runs, so nothing is patched and nothing is left behind. A module that attended in another way would see the tokens of
its own rank only: numbers that look right and are not. So each is held to ask as often as its plan says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Ask = Callable[..., Tensor]
"""Attention of a module: (path, streams, query, key, value, mask=, scale=)."""


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


class Seam(TorchFunctionMode):
    """Gives one attention module's calls of scaled_dot_product_attention to `ask`.

    num_calls: so many it makes each time when it runs. num_runs: how often it ran since the last `settle`.
    """

    def __init__(self, path: str, streams: tuple[str, ...], num_calls: int, ask: Ask) -> None:
        super().__init__()
        self.path = path
        self.num_runs = 0
        self._streams = streams
        self._num_calls = num_calls
        self._ask = ask
        self._asked = 0
        self._open = False

    def enter(self, module: nn.Module, args: Any) -> None:
        """The module begins."""
        self._asked = 0
        self.__enter__()
        self._open = True

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """The module has ended; out: None after an error.

        Raises RuntimeError when its attention went past the engine.
        """
        self.close()
        if out is None:
            return
        self.num_runs += 1
        if self._asked != self._num_calls:
            raise self._miscounted()

    def _miscounted(self) -> RuntimeError:
        return RuntimeError(
            f"attention of {self.path} went past the engine: {self._asked} calls reached it, not {self._num_calls}"
        )

    def settle(self) -> None:
        """A forward of the model is over. Raises RuntimeError unless the module ran once in it."""
        num_runs, self.num_runs = self.num_runs, 0
        if num_runs != 1:
            raise RuntimeError(f"attention of {self.path} went past the engine: it ran {num_runs} times in a forward")

    def close(self) -> None:
        if self._open:
            self._open = False
            self.__exit__(None, None, None)

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
        return self._ask(self.path, self._streams, query, key, value, mask=attn_mask, scale=scale)
