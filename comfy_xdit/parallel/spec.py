"""Degrees of parallelism: how many ranks each method gets."""

from __future__ import annotations

import dataclasses
import math

AXES = ("dp", "cfg", "pipe", "ring", "ulysses", "tensor")
"""Names of the mesh axes, outermost first: ulysses and tensor talk most, so their ranks are neighbours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """Degrees of each parallel method; their product is the number of ranks.

    Raises ValueError for a degree that is not a positive whole number.
    """

    dp: int = 1
    cfg: int = 1
    pipe: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise ValueError(f"{axis}={degree!r} is not a degree; use a whole number, 1 or more")

    @property
    def degrees(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_ranks(self) -> int:
        return math.prod(self.degrees.values())

    def __str__(self) -> str:
        used = [f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " × ".join(used) or "1 rank"
