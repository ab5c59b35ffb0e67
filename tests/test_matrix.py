"""The parity matrix: every product of methods that there is, for each family, on 1, 2, 3, 4 and 8 ranks.

Exact methods are held to diffusers' own forward in the sampler's loop, to 1e-5 in fp32; so are the approximate ones
where they have to be exact: in step mode, and where no key is old. Their approximation equals its emulation in one
process bit for bit, in fp64. Sizes are such that most degrees divide neither heads, tokens, rows nor blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy_xdit_bench.modes import is_exact
from modes import KINDS, METHODS, NUM_PATCHES, Job, call_of
from oracle import emulate
from ranks import Ranks, plain_denoise, tiny_model
from test_pipefusion import serial_result

from comfy_xdit.parallel.spec import MAX_CFG, ParallelSpec, check, products

LIMIT = 1e-5
"""Largest difference of exact methods, in fp32."""

ORDER_LIMIT = 1e-14
"""In fp64, where numbers are added in another order than in the emulation."""

NUM_RANKS = (1, 2, 3, 4, 8)

def specs(num_ranks: int) -> list[ParallelSpec]:
    found = products(num_ranks, {"cfg": MAX_CFG})
    return [spec for spec in found if not check(spec, num_ranks=num_ranks)]


def cases() -> Iterator[Any]:
    """Every spec with every family; but hybrids of the largest group take families in turn, save half of those of
    three methods."""
    for num_ranks in NUM_RANKS:
        for number, spec in enumerate(specs(num_ranks)):
            num_methods = sum(degree > 1 for degree in spec.degrees.values())
            all_kinds = num_ranks < max(NUM_RANKS) or num_methods == 1 or (num_methods == 3 and number % 2)
            for kind in KINDS if all_kinds else [list(KINDS)[number % len(KINDS)]]:
                yield pytest.param(num_ranks, kind, spec, id=f"{kind}, {num_ranks}: {spec}")


def adds_in_another_order(spec: ParallelSpec) -> bool:
    """DistriFusion's old keys go round a ring, which the emulation has at once; and the sum of more than two shards."""
    return (spec.distri > 1 and spec.ring > 1) or spec.tensor > 2


@functools.cache
def one_rank(job: Job) -> dict[str, torch.Tensor]:
    """Diffusers' own forward, in the sampler's loop and once, in fp32."""
    with torch.inference_mode():
        runs = {name: serial_result(job.model(), job.fields(name, torch.float32)) for name in METHODS}
    return {**runs, "one evaluation": plain_denoise(job.model(), [call_of(job)])[0]}


@functools.cache
def approximation(job: Job, spec: ParallelSpec) -> torch.Tensor:
    model, num_patches = tiny_model(**job.model(torch.float64)), NUM_PATCHES if spec.distri == 1 else 0
    return emulate(model, job.fields("old keys"), spec, num_patches=num_patches)[0]


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


@pytest.fixture(scope="module")
def ranks(request):
    with Ranks(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def figures(request):
    """(kind, ranks) → name of a comparison → the largest difference of each mode; printed at the end."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    yield found
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for (kind, num_ranks), differences in sorted(found.items()):
            parts = [f"{name} {max(values):.0e} (of {len(values)})" for name, values in differences.items()]
            sys.stdout.write(f"\n{kind}, {num_ranks} against one rank: {', '.join(parts)}")


@pytest.mark.parametrize(("ranks", "kind", "spec"), list(cases()), indirect=["ranks"])
def test_every_mode(ranks, kind, spec, figures) -> None:
    job = Job.of(kind, spec)
    arguments = {"spec": spec, "job": job}
    found, *others = ranks.run("run_of", module="modes", function="run_mode", arguments=arguments)
    assert all(value is None for answer in others for value in answer.values())
    differences = {name: difference(value, one_rank(job)[name]) for name, value in found.items() if name != "old keys"}
    if not is_exact(spec):
        # However many stages there are, the result is the same.
        want = approximation(job, dataclasses.replace(spec, pipe=1))
        differences["emulation"] = difference(found["old keys"], want)
        differences["drift"] = difference(found["old keys"], one_rank(job)["old keys"])
    for name, value in differences.items():
        figures.setdefault((kind, ranks.num_ranks), {}).setdefault(name, []).append(value)
    assert differences["exact"] <= LIMIT
    if not is_exact(spec):
        assert differences["one evaluation"] <= LIMIT
        assert differences["emulation"] <= (ORDER_LIMIT if adds_in_another_order(spec) else 0)
        assert 1e-4 < differences["drift"] < 0.1, "no key was old, or all were wrong"
