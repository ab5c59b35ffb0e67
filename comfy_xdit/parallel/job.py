"""What the engine is given to sample with, whoever asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from comfy_xdit.trajectory import SamplerProgram


class SamplingJob(Protocol):
    """A whole sampling run. `messages.Sample` is one, and says what each field holds."""

    @property
    def program(self) -> SamplerProgram: ...
    @property
    def noise(self) -> Tensor: ...
    @property
    def latent(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def noises(self) -> Sequence[Tensor | None]: ...
    @property
    def conds(self) -> Sequence[dict[str, Any]]: ...
    @property
    def num_patches(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def stale(self) -> bool: ...
