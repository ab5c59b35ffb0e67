"""How many kernels a rank launches for an evaluation: on a GPU each costs the host microseconds, parallel or not."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from ranks import Ranks, groups, tiny_call, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.cut import cut
from comfy_xdit.parallel.denoise import evaluate
from comfy_xdit.parallel.spec import ParallelSpec

MOST = {
    "ulysses 2": {"flux": 1.15, "sd3": 1.15, "pixart": 1.15},
    "ulysses 4": {"flux": 1.15, "sd3": 1.15, "pixart": 1.15},
    "ring 2": {"flux": 1.12, "sd3": 1.18, "pixart": 1.25},
    "ulysses 2 ring 2": {"flux": 1.16, "sd3": 1.2, "pixart": 1.33},
    "ring 4": {"flux": 1.27, "sd3": 1.42, "pixart": 1.58},
}
"""Kernels of a rank, as a multiple of those of one rank alone, where tokens and heads divide. Each further block of a
ring is one more attention, and one more blend: much for the short blocks of SD3 and PixArt."""

KINDS = {
    # Twice as many single blocks as double ones, as in Flux.1.
    "flux": {"family": "flux", "heads": 8, "layers": 6},
    "sd3": {"family": "sd3", "heads": 8, "layers": 6},
    "pixart": {"family": "pixart", "heads": 8, "layers": 6},
}

NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "alias")


class Kernels(TorchDispatchMode):
    """Counts operations that compute or copy: views, allocations and messages are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not is_view and name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(kind: str, degrees: dict[str, int]) -> Counter[str]:
    """Job: kernels of an evaluation of one image, of 64 tokens and 16 of text."""
    options = dict(KINDS[kind])
    model = tiny_model(**options, dtype=torch.bfloat16)
    call = tiny_call(options["family"], seed=0, batch=1, size=(16, 16), text=16, dtype=torch.bfloat16)
    # Not in inference mode, which hands composite operations over whole.
    with (
        ParallelContext(ParallelSpec(**degrees), groups()) as context,
        torch.no_grad(),
        cut(model.module, model.family.plan, context),
        Kernels() as kernels,
    ):
        evaluate(model, [call], context)
    return kernels.counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOST)
def test_kernels_of_a_rank(name, kind) -> None:
    words = name.split()
    degrees = {axis: int(degree) for axis, degree in zip(words[::2], words[1::2], strict=True)}
    alone = count(kind, {})
    with Ranks(ParallelSpec(**degrees).num_ranks) as ranks:
        arguments = {"kind": kind, "degrees": degrees}
        found = ranks.run("run_of", module="test_kernel_counts", function="count", arguments=arguments)
    most = max(kernels.total() for kernels in found)
    sys.stdout.write(f"\n{kind}: {most} kernels with {name}, {alone.total()} alone: {most / alone.total():.3f}\n")
    more = {operation: number - alone[operation] for operation, number in found[0].items()}
    assert most <= MOST[name][kind] * alone.total(), {operation: number for operation, number in more.items() if number}
