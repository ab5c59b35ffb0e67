"""DistriFusion on any module with a plan: exact where it should be, else what its emulation in one process gives."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from staged_toys import PLANS, arguments, stageable

NUM = 4
"""Evaluations, each of other numbers."""

CASES = {
    "joint": ("joint", {}),
    "joint, masked": ("joint", {"masked": True}),
    "two streams": ("pair", {}),
    "a stream without tokens": ("pair", {"audio": 0}),
    "blocks that attend themselves": ("line", {"height": 3}),
    "a list that runs several times": ("grid", {"height": 3}),
}
DEGREES = [{"distri": 2}, {"distri": 3}, {"distri": 2, "ulysses": 2}, {"distri": 2, "ring": 2}]

PLAIN = F.scaled_dot_product_attention


def run_distri(toy, degrees, sizes, warmup_steps=1, stale=True):
    """Job: what the toy gives in each of the evaluations; the bytes of the buffers of keys."""
    from ranks import groups

    from comfy_xdit.parallel.attention import SequenceAttention
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.distri import DistriKeys
    from comfy_xdit.parallel.spec import ParallelSpec
    from comfy_xdit.parallel.whole_shaped import whole_shaped

    model, outs = stageable(toy, torch.float64), []
    context = ParallelContext(ParallelSpec(**degrees), groups())
    keys = DistriKeys(context.axis("distri"), ["same"] * NUM, warmup_steps=warmup_steps, stale=stale)
    attend = SequenceAttention(context, keys)
    with torch.inference_mode(), keys, whole_shaped(model, PLANS[toy], context, attend) as work:
        for number in range(NUM):
            keys.begin(number)
            outs.append(model(**arguments(toy, seed=number, **sizes), options={"override": work.attend}))
    return outs, keys.most_bytes_held


class Emulation:
    """torch's attention, on whole tensors: to the queries of each rank, other ranks' keys are an evaluation old.

    Which token is whose is told from the sequences' lengths. inner: ranks between whom keys are fresh.
    """

    def __init__(self, streams, num_ranks, inner):
        self.streams, self.num_ranks, self.inner = streams, num_ranks, inner
        self.old, self.fresh = [], []

    def begin(self):
        self.old, self.fresh = self.fresh, []

    def owners(self, length):
        """Of each token the rank."""
        owners = []
        for size in self.streams[length]:
            shards = torch.arange(size).tensor_split(self.num_ranks * self.inner)
            owners += [number // self.inner for number, shard in enumerate(shards) for _ in shard]
        return torch.tensor(owners)

    def __call__(self, query, key, value, attn_mask=None, scale=None):
        number = len(self.fresh)
        self.fresh.append((key, value))
        if not self.old:
            return PLAIN(query, key, value, attn_mask=attn_mask, scale=scale)
        out = torch.empty_like(query)
        for rank in range(self.num_ranks):
            own = (self.owners(key.shape[2]) == rank)[:, None]
            k, v = (torch.where(own, new, old) for new, old in zip((key, value), self.old[number], strict=True))
            rows = (self.owners(query.shape[2]) == rank).nonzero()[:, 0]
            mask = attn_mask
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., rows, :]
            out[:, :, rows] = PLAIN(query[:, :, rows], k, v, attn_mask=mask, scale=scale)
        return out


def emulated(toy, degrees, sizes, warmup_steps):
    audio, text = sizes.get("audio", 7), sizes.get("text", 5)
    streams = {text + 11: (text, 11), 12: (12,), audio: (audio,), 27: (27,)}
    inner = math.prod(degrees.values()) // degrees["distri"]
    attend = Emulation(streams, degrees["distri"], inner)
    model, outs = stageable(toy, torch.float64), []
    with torch.inference_mode(), mock.patch.object(F, "scaled_dot_product_attention", attend):
        for number in range(NUM):
            attend.begin()
            if number < warmup_steps:
                attend.old = []
            outs.append(model(**arguments(toy, seed=number, **sizes)))
    return outs


def exact(toy, sizes):
    model = stageable(toy, torch.float64)
    with torch.inference_mode():
        return [model(**arguments(toy, seed=number, **sizes)) for number in range(NUM)]


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=DEGREES, ids=[" ".join(each) + f" {each['distri']}" for each in DEGREES])
def spread(request):
    with Ranks(math.prod(request.param.values())) as started:
        yield started, request.param


def asked(spread, case, **method):
    started, degrees = spread
    toy, sizes = CASES[case]
    named = {"toy": toy, "degrees": degrees, "sizes": sizes, **method}
    return started.run("run_of", module="test_distri_toys", function="run_distri", arguments=named)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [{"stale": False}, {"warmup_steps": NUM}], ids=["fresh", "all warm-up"])
def test_exact_variants_equal_one_rank(spread, case, method):
    expected = exact(*CASES[case])
    for outs, num_bytes in asked(spread, case, **method):
        assert max(map(error, outs, expected)) <= 1e-12
        assert num_bytes == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_old_keys_equal_the_emulation(spread, case, warmup_steps):
    """The first evaluation is exact in any case; and old keys do change what comes after the warm-up."""
    expected, fresh = emulated(*_of(case, spread), max(warmup_steps, 1)), exact(*CASES[case])
    for outs, num_bytes in asked(spread, case, warmup_steps=warmup_steps):
        assert max(map(error, outs, expected)) <= 1e-12
        drifts = list(map(error, outs, fresh))
        num_exact = max(warmup_steps, 1)
        assert max(drifts[:num_exact]) <= 1e-12 and min(drifts[num_exact:]) > 1e-3
        assert num_bytes > 0


def _of(case, spread):
    toy, sizes = CASES[case]
    return toy, spread[1], sizes


def test_too_few_tokens_are_never_old():
    """A text that cannot be cut is computed whole by every rank."""
    expected = exact("joint", {"text": 1})
    named = {"toy": "joint", "degrees": {"distri": 2}, "sizes": {"text": 1}}
    with Ranks(2) as started:
        answers = started.run("run_of", module="test_distri_toys", function="run_distri", arguments=named)
    for outs, num_bytes in answers:
        assert max(map(error, outs, expected)) <= 1e-12 and num_bytes == 0
