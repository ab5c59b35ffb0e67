"""The worker's service on GPUs that aren't there: what CUDA and NCCL would refuse, wait for, or hang at.

Every rank of every case runs, one after the other (`rehearsal.py`, `pretend.py`), then the ranks' records are compared
and replayed on a model of streams (`nccl_sim.py`). What this shows, and what it can't, is in docs/gpu.md.
"""

import dataclasses
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from cuda_checks import NUM_WAITS, hangs, kernels_per_block, loop_waits, num_streams
from events import Follow, Kernel, Launch, Wait
from nccl_sim import brief, differences, launches, stuck
from rehearsal import Case, play, play_probe, play_vae

from comfy_xdit.parallel import flash
from comfy_xdit.pool.environment import SET

FP8 = {"storage": "float8_e4m3fn"}
FP16 = {"storage": "float16", "compute": "float16"}
FP32 = {"storage": "float32", "compute": "float32"}
METHODS = ("cfg", "ulysses", "ring", "pipe", "tensor", "distri")
TURING, ADA, HOPPER, BLACKWELL = ((7, 5), (8, 9), (9, 0), (12, 0))

ONE_RANK = [
    Case(capability=ADA),
    Case(**FP8, lora=True, capability=BLACKWELL),
    Case(**FP16, capability=TURING),
    Case(**FP32, capability=HOPPER),
    Case(mask=True, capability=TURING),
    Case(family="sd3"),
    Case(family="pixart"),
]
ALONE = [
    Case(degrees={"cfg": 2}, capability=BLACKWELL),
    Case(degrees={"dp": 2}, batch=2, **FP32),
    Case(degrees={"ulysses": 2}),
    Case(degrees={"ulysses": 2}, **FP8, lora=True, capability=HOPPER),
    Case(degrees={"ring": 2}),
    Case(degrees={"ring": 2}, **FP16, capability=TURING),
    Case(degrees={"ring": 2}, mask=True, capability=HOPPER),
    Case(degrees={"ring": 2}, capability=TURING),
    Case(degrees={"pipe": 2}),
    Case(degrees={"pipe": 2}, **FP8, lora=True, capability=BLACKWELL),
    Case(degrees={"tensor": 2}),
    Case(degrees={"tensor": 2}, **FP8, lora=True),
    Case(degrees={"distri": 2}),
    Case(degrees={"distri": 2}, **FP16, capability=HOPPER),
    Case(degrees={"ulysses": 3}, size=(62, 66)),
    Case(degrees={"ring": 3}, size=(62, 66)),
]
FAMILIES = [
    Case(family=family, degrees={method: 2}, **kind)
    for family in ("sd3", "pixart")
    for method, kind in {"ulysses": {}, "ring": FP16, "pipe": {}, "tensor": FP8 | {"lora": True}, "distri": {}}.items()
]
HYBRIDS = [
    Case(degrees={"cfg": 2, "pipe": 2}),
    Case(degrees={"cfg": 2, "ulysses": 2}, **FP8),
    Case(degrees={"dp": 2, "cfg": 2}, batch=2),
    Case(degrees={"pipe": 2, "ulysses": 2}, **FP8),
    Case(degrees={"pipe": 2, "ring": 2}),
    Case(degrees={"pipe": 2, "tensor": 2}),
    Case(degrees={"ring": 2, "ulysses": 2}, **FP16, capability=TURING),
    Case(degrees={"distri": 2, "ulysses": 2}),
    Case(degrees={"distri": 2, "ring": 2}, capability=HOPPER),
    Case(degrees={"tensor": 2, "ulysses": 2}, **FP8, lora=True),
    Case(degrees={"pipe": 4}, depth=2),
    Case(degrees={"cfg": 2, "pipe": 2, "ulysses": 2}),
    Case(degrees={"distri": 2, "ring": 2, "ulysses": 2}),
]
ONE_BY_ONE = [Case(degrees=degrees, steps=0) for degrees in ({}, {"ulysses": 2}, {"pipe": 2}, {"cfg": 2, "tensor": 2})]
CASES = [*ONE_RANK, *ALONE, *FAMILIES, *HYBRIDS, *ONE_BY_ONE]

LIMITS = {
    # In bf16 on an 8.9, of one block; both conditionings are one batch but on the cfg axis.
    "flux 1 rank": {"FluxTransformerBlock": 99, "FluxSingleTransformerBlock": 49},
    "flux ulysses=2": {"FluxTransformerBlock": 107, "FluxSingleTransformerBlock": 53},
    "flux ring=2": {"FluxTransformerBlock": 111, "FluxSingleTransformerBlock": 57},
    "flux tensor=2": {"FluxTransformerBlock": 107, "FluxSingleTransformerBlock": 53},
    "flux distri=2": {"FluxTransformerBlock": 108, "FluxSingleTransformerBlock": 54},
    "flux pipe=2": {"FluxTransformerBlock": 111, "FluxSingleTransformerBlock": 55},
    "sd3 1 rank": {"JointTransformerBlock": 111},
    "sd3 ulysses=2": {"JointTransformerBlock": 120},
    "sd3 distri=2": {"JointTransformerBlock": 123},
    "pixart 1 rank": {"BasicTransformerBlock": 32},
    "pixart ulysses=2": {"BasicTransformerBlock": 37},
    "pixart distri=2": {"BasicTransformerBlock": 38},
}
"""The most kernels that a block may launch: what it launched when this was written. Where tokens are cut, a model's
first block has those that cut them: its streams, and in Flux sines and cosines of the positions. With pipe a patch's
blocks compare once what they compute once an evaluation."""

ULYSSES_8 = {"FluxTransformerBlock": 107, "FluxSingleTransformerBlock": 53}

ONCE_A_JOB = Counter({"Stream.synchronize": 1})
"""All that the host may wait for its device between the first block of a run and the last: to set its clock."""

covered: Counter[str] = Counter()


def is_plain(case: Case) -> bool:
    return case.storage == case.compute == "bfloat16" and case.capability == ADA and case.steps > 0 and not case.mask


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_is_one_that_cuda_and_nccl_take(case):
    played = play(case)
    records = [[*one.loaded, *one.ran] for one in played]
    assert not differences(records)
    assert not hangs(played)
    if case.steps:
        assert all(_kinds(loop_waits(one.ran)) <= ONCE_A_JOB for one in played), [loop_waits(one.ran) for one in played]
    # With more streams than queues a receive that waits for its sender would hold up work that does not.
    assert all(num_streams(record) <= int(SET["CUDA_DEVICE_MAX_CONNECTIONS"]) for record in records)
    limits = LIMITS.get(f"{case.family} {case.spec}") if is_plain(case) else None
    if limits is not None:
        assert within(kernels_per_block([one.ran for one in played]), limits)
    for record in records:
        covered.update(type(event).__name__ for event in record)
    covered["ranks"] += len(records)
    covered["cases"] += 1
    covered["limits"] += limits is not None


@pytest.mark.parametrize("degrees", [{}, *({method: 2} for method in METHODS)], ids=str)
def test_the_host_waits_as_often_in_a_long_run_as_in_a_short_one(degrees):
    """Of a deeper model, too: no wait a step, none a layer."""
    case = Case(degrees=degrees, steps=3 if "pipe" in degrees else 2)
    short, long = (play(each) for each in (case, dataclasses.replace(case, steps=case.steps + 2, depth=case.depth + 1)))
    for one, other in zip(short, long, strict=True):
        assert num_kernels(other.ran) > 2 * num_kernels(one.ran)
        assert loop_waits(one.ran) == loop_waits(other.ran)


def test_eight_ulysses_ranks_launch_little_more_than_one():
    played = play(Case(degrees={"ulysses": 8}, steps=1))
    assert within(kernels_per_block([one.ran for one in played]), ULYSSES_8)


@pytest.mark.parametrize("degrees", [*({method: 2} for method in METHODS), {"pipe": 4}, {"pipe": 2, "cfg": 2}], ids=str)
def test_every_launch_may_wait_for_the_device(degrees):
    """If nobody hangs where all wait at every launch, nobody does where some wait at some: a wait only holds up."""
    records = [brief([*one.loaded, *one.ran]) for one in play(Case(degrees=degrees, depth=2))]
    assert not stuck(records, held=launches(records))
    assert not stuck(records, held=launches(records), eager=True)


@pytest.mark.parametrize("degrees", [{"pipe": 2}, {"pipe": 2, "cfg": 2}], ids=str)
def test_stages_may_load_kernels_for_new_sizes_in_mid_run(degrees):
    """The first patches are the first of their size: cuBLAS may have another kernel for them than for whole images."""
    records = [brief([*one.loaded, *one.ran]) for one in play(Case(degrees=degrees))]
    assert not stuck(records, lazy_loading=True, lazy_libraries=True)


def flash_attn(q, k, v, softmax_scale=None, return_attn_probs=False):
    """flash-attn's function as its users know it: [batch, tokens, heads, head dim], and the LSE in fp32."""
    for x in (q, k, v):
        assert x.dtype == q.dtype and x.dtype in (torch.float16, torch.bfloat16) and x.device == q.device
        assert x.dim() == 4 and x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[0] == q.shape[0]
    assert k.shape == v.shape and return_attn_probs
    return q.clone(), q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32), None


@pytest.mark.parametrize(("name", "card"), [("flash-attn 2", ADA), ("flash-attn 3", HOPPER)])
@pytest.mark.parametrize("method", ["ulysses", "ring", "pipe", "distri"])
def test_a_run_with_flash_attn_is_one_that_cuda_and_nccl_take(method, name, card):
    with mock.patch.object(flash, "usable", lambda wanted, device, dtype: flash_attn if wanted == name else None):
        played = play(Case(degrees={method: 2}, capability=card))
    assert not differences([[*one.loaded, *one.ran] for one in played])
    assert not hangs(played)
    assert all(_kinds(loop_waits(one.ran)) <= ONCE_A_JOB for one in played)
    names = {event.name for one in played for event in one.ran if isinstance(event, Kernel)}
    assert not [name for name in names if name.startswith("_scaled_dot_product")]


@pytest.mark.parametrize(("num_ranks", "dtype"), [(1, "float32"), (2, "float32"), (3, "bfloat16")])
def test_a_vae_is_one_that_cuda_and_nccl_take(num_ranks, dtype):
    # Rows that all ranks have as many of: their numbers go by NCCL, where a pretended rank sees its own only.
    records = play_vae(num_ranks, dtype, rows=12)
    assert not differences(records)
    assert not stuck(records) and not stuck(records, lazy_loading=True)
    whole = [brief(record) for record in records]
    assert not stuck(whole, held=launches(whole))
    for record in records:
        ours = Counter(event.where for event in record if isinstance(event, Wait) and "distvae/" not in event.where)
        waits = {where: number for where, number in ours.items() if "layers/conv" not in where}
        # Of two images each way: the batch to the device, and each result from it.
        assert sum(waits.values()) <= 6, waits
    covered["ranks"] += num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_measurement_is_one_that_cuda_and_nccl_take(num_ranks):
    records = play_probe(num_ranks)
    assert not differences(records)
    assert not stuck(records) and not stuck(records, lazy_loading=True, held=launches(records))


def test_what_was_covered(capsys):
    """Says what the tests above looked at; runs last."""
    if covered["cases"] < len(CASES):
        pytest.skip("not all tests of this file ran")
    records = f"{covered['ranks']} runs of a rank: {covered[Kernel.__name__]:,} kernels"
    calls = f"{covered[Launch.__name__]:,} operations of NCCL, {covered[Follow.__name__]:,} waits of a stream for one"
    with capsys.disabled():
        sys.stdout.write(f"\n{records}, {calls}; {covered['limits']} limits of launches\n")
        replays = f"each replayed with lazy loading and with {NUM_WAITS} waits for a device"
        sys.stdout.write(f"{covered['cases']} cases, {replays}\n")
    assert covered["limits"] == len(LIMITS)


def within(launched: dict[str, int], limits: dict[str, int]) -> bool:
    return launched.keys() == limits.keys() and all(launched[name] <= limits[name] for name in limits)


def num_kernels(record) -> int:
    return sum(isinstance(event, Kernel) for event in record)


def _kinds(waits: Counter[str]) -> Counter[str]:
    """Without the lines that they come from."""
    kinds: Counter[str] = Counter()
    for wait, number in waits.items():
        kinds[wait.split(" in ")[0]] += number
    return kinds
