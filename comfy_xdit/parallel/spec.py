"""Degrees of parallelism: how many ranks each method gets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from comfy_xdit.errors import InputError

AXES = ("dp", "cfg", "pipe", "distri", "ring", "ulysses", "tensor")
"""Names of the mesh axes, outermost first: ulysses and tensor talk most, so their ranks are neighbours."""

APPROXIMATE = ("pipe", "distri")
"""The axes whose methods reuse activations of an earlier evaluation."""

MAX_CFG = 2
"""Guidance has a conditional and an unconditional chunk."""


BALANCES = ("time", "memory")
"""What the stages of a pipeline can have alike: the time that they take, or the weights that they hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """Degrees of each parallel method; their product is the number of ranks.

    Raises InputError for a degree that is not a positive whole number.
    """

    dp: int = 1
    cfg: int = 1
    pipe: int = 1
    distri: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise InputError(f"{axis}={degree!r} is not a degree; use a whole number, 1 or more")

    @property
    def degrees(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_ranks(self) -> int:
        return math.prod(self.degrees.values())

    def weights_of(self, rank: int, balance: str = BALANCES[0]) -> WeightShare:
        """What part of a model's weights `rank` holds. balance: what stages have alike.

        Raises InputError for a balance that is not one of `BALANCES`.
        """
        if balance not in BALANCES:
            raise InputError(f"stages cannot be balanced by {balance!r}; use {' or '.join(BALANCES)}")
        place, places = rank, {}
        for axis in reversed(AXES):
            place, places[axis] = divmod(place, getattr(self, axis))
        return WeightShare(
            stage=places["pipe"],
            num_stages=self.pipe,
            # One stage is the same however it is balanced.
            balance=balance if self.pipe > 1 else BALANCES[0],
            shard=places["tensor"],
            num_shards=self.tensor,
        )

    def __str__(self) -> str:
        used = [f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " × ".join(used) or "1 rank"  # noqa: RUF001


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightShare:
    """A rank's part of a model: the blocks of one pipeline stage, and one shard of each weight that is cut.

    balance: what the stages have alike, one of `BALANCES`.
    """

    stage: int = 0
    num_stages: int = 1
    balance: str = BALANCES[0]
    shard: int = 0
    num_shards: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What limits the degrees of a model: its name for people, attention heads, and blocks in order.

    methods: the axes that there are for it.
    tensor_divides: the number that a degree of tensor must divide; 0: the heads.
    """

    title: str
    num_heads: int
    num_blocks: int
    methods: tuple[str, ...] = AXES
    tensor_divides: int = 0


def check(spec: ParallelSpec, *, num_ranks: int, shape: ModelShape | None = None) -> list[str]:
    """All that stands against running `shape` with `spec` on `num_ranks` ranks, a sentence each; [] is good.

    Without a shape (before a model is known) only the degrees are checked.
    """
    faults = []
    if spec.num_ranks == 1 != num_ranks:
        faults.append(
            f"all degrees are 1, but the pool has {num_ranks} workers; set one to 0 (chosen), "
            f"or use degrees whose product is {num_ranks}"
        )
    elif spec.num_ranks != num_ranks:
        faults.append(
            f"{spec} makes {_ranks(spec.num_ranks)}, but the pool has {num_ranks}; "
            f"use degrees whose product is {num_ranks}"
        )
    if spec.cfg > MAX_CFG:
        faults.append(f"cfg={spec.cfg} is more than cond and uncond; use 1 or 2")
    if spec.pipe > 1 and spec.distri > 1:
        faults.append(
            f"pipe={spec.pipe} and distri={spec.distri} do not go together, as each gives old activations a use "
            "of its own; set one of them to 1"
        )
    return faults + (_shape_faults(spec, shape) if shape else [])


def _shape_faults(spec: ParallelSpec, shape: ModelShape) -> list[str]:
    missing = [axis for axis, degree in spec.degrees.items() if degree > 1 and axis not in shape.methods]
    if missing:
        return [f"{shape.title} can't run with {_names(tuple(missing))} yet; use {_names(shape.methods)}"]
    faults = []
    heads = shape.num_heads
    whole = shape.tensor_divides or heads
    if whole % spec.tensor:
        fitting = [str(degree) for degree in range(1, whole + 1) if whole % degree == 0]
        what = f"{heads} heads" if whole == heads else f"{heads} heads and its layers"
        faults.append(
            f"tensor={spec.tensor} cannot cut {shape.title}'s {what} evenly; "
            f"use {', '.join(fitting[:-1])}{' or ' if fitting[:-1] else ''}{fitting[-1]}"
        )
    heads_left = max(heads // spec.tensor, 1)
    if spec.ulysses > heads_left:
        shared = f" with tensor={spec.tensor}" if spec.tensor > 1 else ""
        faults.append(
            f"ulysses={spec.ulysses} cannot cut {shape.title}'s {heads} heads{shared}; "
            f"use {heads_left} or less"
        )
    if spec.pipe > shape.num_blocks:
        faults.append(
            f"pipe={spec.pipe} cannot cut {shape.title}'s {shape.num_blocks} blocks; "
            f"use {shape.num_blocks} or less"
        )
    return faults


def auto(
    num_ranks: int,
    *,
    requested: dict[str, int],
    shape: ModelShape | None = None,
    num_chunks: int = 1,
    cost: Callable[[ParallelSpec], Any] | None = None,
) -> ParallelSpec:
    """The degrees for `num_ranks` ranks: those requested, and the free ones (0 or absent) chosen.

    cfg first when there is guidance (num_chunks of 2 or more: cond and uncond cost the least
    communication), then ulysses up to the heads, then ring, and dp takes what is left. pipe, distri and
    tensor stay 1 unless requested: the first two approximate, the last talks most.
    cost: of all exact specs with the requested degrees, the one with the least is taken instead, and tensor
    is free too; where several cost the same, the one that the rule above gives.
    Raises InputError with the faults when no such spec exists.
    """
    unknown = sorted(set(requested) - set(AXES))
    if unknown:
        raise InputError(f"{unknown[0]!r} is no parallel method; use {_names(AXES)}")
    degrees = {axis: degree for axis, degree in requested.items() if degree != 0}
    degrees = {"pipe": 1, "distri": 1, "tensor": 1, **degrees}
    fixed = ParallelSpec(**degrees)
    if num_ranks % fixed.num_ranks:
        raise InputError(
            f"{fixed} makes {_ranks(fixed.num_ranks)}, which do not divide the pool's {num_ranks}; "
            f"use degrees whose product divides {num_ranks}"
        )
    left = num_ranks // fixed.num_ranks
    heads = max(shape.num_heads // fixed.tensor, 1) if shape else num_ranks
    for axis, limit in (("cfg", min(num_chunks, MAX_CFG)), ("ulysses", heads), ("ring", left), ("dp", left)):
        if axis not in degrees:
            degrees[axis] = max(d for d in range(1, left + 1) if left % d == 0 and (d <= limit or d == 1))
            left //= degrees[axis]
    spec = ParallelSpec(**degrees)
    faults = check(spec, num_ranks=num_ranks, shape=shape)
    if faults:
        raise InputError("; ".join(faults))
    if cost is None:
        return spec
    wanted = {axis: degree for axis, degree in requested.items() if degree != 0}
    limits = {**dict.fromkeys(APPROXIMATE, 1), "cfg": min(num_chunks, MAX_CFG), **wanted}
    others = [
        other
        for other in products(num_ranks, limits)
        if all(getattr(other, axis) == degree for axis, degree in wanted.items())
        and not check(other, num_ranks=num_ranks, shape=shape)
    ]
    return min([spec, *others], key=cost)


def products(num_ranks: int, limits: dict[str, int]) -> Iterator[ParallelSpec]:
    """Every spec of `num_ranks` ranks whose degrees are within `limits`; axes without one are free."""
    divisors = [degree for degree in range(1, num_ranks + 1) if num_ranks % degree == 0]
    choices = [[degree for degree in divisors if degree <= limits.get(axis, num_ranks)] for axis in AXES]
    for degrees in itertools.product(*choices):
        if math.prod(degrees) == num_ranks:
            yield ParallelSpec(**dict(zip(AXES, degrees, strict=True)))


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _names(axes: tuple[str, ...]) -> str:
    return f"{', '.join(axes[:-1])} and {axes[-1]}" if axes[1:] else axes[0]
