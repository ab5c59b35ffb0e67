"""Where the host's samplers get their random numbers from, tapped for the length of a run.

`torch.randn_like`, `default_noise_sampler` and whatever else draws a tensor of the latent's shape is
seen through a TorchFunctionMode, which belongs to the thread that entered it. Brownian trees are many
draws in one, so they are tapped as a whole, by replacing the methods of one class for as long as the
run lasts; other threads go through the replacement to the original.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfy.k_diffusion.sampling as k_sampling
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

IN_PLACE = (torch.Tensor.normal_, torch.Tensor.uniform_)
DRAWS = (torch.randn, torch.randn_like, torch.rand, torch.rand_like, torch.normal, *IN_PLACE)

_trees = threading.Lock()


class Tap(TorchFunctionMode):
    """Hands every draw of a tensor of `shape` to `answer`, and returns what that makes of it.

    drawing: called with each generator that is named in a draw, before the draw.
    """

    def __init__(
        self,
        shape: torch.Size,
        answer: Callable[[Tensor], Tensor],
        drawing: Callable[[torch.Generator], None] = lambda generator: None,
    ) -> None:
        super().__init__()
        self._shape = shape
        self._answer = answer
        self._drawing = drawing
        self._quiet = 0
        self._seeded = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = kwargs.get("generator") if kwargs else None
        if generator is not None and not self._seeded:
            self._drawing(generator)
        made = func(*args, **(kwargs or {}))
        taps = func in DRAWS and not self._quiet and made.shape == self._shape
        return self._answer(made) if taps else made

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Let draws pass untapped: those inside a larger source, and our own."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """As `quiet`, for a source that seeds a generator of its own for each draw: none is told of them."""
        self._seeded += 1
        try:
            with self.quiet():
                yield
        finally:
            self._seeded -= 1

    def noise_sampler(self, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Stands in for a noise sampler that came as one of the sampler's options."""

        def tapped(*args: Any, **kwargs: Any) -> Tensor:
            return self.whole(lambda: real(*args, **kwargs))

        return tapped

    def whole(self, draw: Callable[[], Tensor]) -> Tensor:
        """Take `draw` as one noise, however many draws it makes inside."""
        with self.quiet():
            drawn = draw()
        return self._answer(drawn)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Tap this thread's draws. One thread at a time; others wait here."""
        tree = k_sampling.BatchedBrownianTree
        with _trees:
            grow, query = tree.__init__, tree.__call__
            owner = threading.get_ident()

            def tapped_grow(this: Any, *args: Any, **kwargs: Any) -> None:
                with self.seeded() if threading.get_ident() == owner else contextlib.nullcontext():
                    grow(this, *args, **kwargs)

            def tapped_query(this: Any, t0: Tensor, t1: Tensor) -> Tensor:
                if threading.get_ident() != owner:
                    return query(this, t0, t1)
                with self.seeded():
                    drawn = query(this, t0, t1)
                return self._answer(drawn)

            tree.__init__, tree.__call__ = tapped_grow, tapped_query
            try:
                with self:
                    yield
            finally:
                tree.__init__, tree.__call__ = grow, query

