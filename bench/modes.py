"""The modes of the parity tables: every method alone on 2, 3 and 4 ranks, all products of two, and some of three."""

from __future__ import annotations

import itertools

from comfy_xdit.parallel.spec import AXES, MAX_CFG, ParallelSpec, check

EIGHT: tuple[dict[str, int], ...] = (
    {"cfg": 2, "ulysses": 4},
    {"cfg": 2, "pipe": 4},
    {"ring": 2, "ulysses": 4},
    {"distri": 4, "ulysses": 2},
    {"cfg": 2, "ring": 2, "ulysses": 2},
    {"cfg": 2, "ulysses": 2, "tensor": 2},
    {"cfg": 2, "pipe": 2, "ulysses": 2},
    {"cfg": 2, "pipe": 2, "tensor": 2},
    {"cfg": 2, "distri": 2, "ulysses": 2},
    {"pipe": 2, "ring": 2, "ulysses": 2},
    {"pipe": 2, "ulysses": 2, "tensor": 2},
    {"distri": 2, "ring": 2, "ulysses": 2},
    {"ring": 2, "ulysses": 2, "tensor": 2},
    {"dp": 2, "cfg": 2, "ulysses": 2},
    {"dp": 2, "pipe": 2, "ulysses": 2},
    {"dp": 2, "distri": 2, "tensor": 2},
)


def modes(num_ranks: int) -> list[ParallelSpec]:
    """Those of 2, 3, 4 or 8 ranks. Raises ValueError for any other number."""
    if num_ranks == 8:
        return [ParallelSpec(**degrees) for degrees in EIGHT]
    if num_ranks not in (2, 3, 4):
        raise ValueError(f"there are no modes for {num_ranks} ranks in the table; use 2, 3, 4 or 8")
    alone = [ParallelSpec(**{axis: num_ranks}) for axis in AXES if axis != "cfg" or num_ranks <= MAX_CFG]
    pairs = [ParallelSpec(**dict.fromkeys(axes, 2)) for axes in itertools.combinations(AXES, 2)]
    return [*alone, *(pair for pair in pairs if not check(pair, num_ranks=num_ranks))]


def title(spec: ParallelSpec) -> str:
    """As the tables name it: "cfg=2 x ulysses=2"."""
    return str(spec).replace("\u00d7", "x")


def is_exact(spec: ParallelSpec) -> bool:
    return spec.pipe == spec.distri == 1
