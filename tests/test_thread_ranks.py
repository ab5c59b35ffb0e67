"""Ranks as threads: the same attention and joined tokens as one rank's, and no rank waits for one that failed."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from comfy_xdit.parallel.attention import Layer, SequenceAttention
from comfy_xdit.parallel.sequence import cut, join
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.thread_ranks import on_threads

SPECS = [{"ulysses": 2}, {"ulysses": 3}, {"ring": 3}, {"ulysses": 2, "ring": 2}]


@pytest.mark.parametrize("degrees", SPECS, ids=str)
def test_attention_of_threads_is_that_of_one_rank(degrees):
    q, k, v = torch.randn(3, 2, 5, 11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = F.scaled_dot_product_attention(q, k, v)

    def work(context):
        axis = context.axis("sequence")
        layer = Layer(path="attn", lengths=(11,), num_shards=axis.degree)
        attend = SequenceAttention(context)
        outs = [attend(*(cut(x, 2, axis) for x in (q, k, v)), layer, mask=None, scale=None) for _ in range(2)]
        return [join(out, 2, 11, axis) for out in outs], sum(context.traffic.bytes.values())

    for outs, sent in on_threads(ParallelSpec(**degrees), work):
        assert sent > 0
        for out in outs:
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degrees", SPECS, ids=str)
def test_the_first_failure_is_raised_and_nobody_waits(degrees):
    before = threading.active_count()
    groups = len(dist.distributed_c10d._world.pg_map)

    def work(context):
        if context.rank == 1:
            raise ValueError("rank 1 has had enough")
        axis = context.axis("sequence")
        x = torch.ones(1, 6, 6, 4)
        layer = Layer(path="attn", lengths=(6 * axis.degree,), num_shards=axis.degree)
        SequenceAttention(context)(x, x, x, layer, mask=None, scale=None)

    with pytest.raises(ValueError, match="rank 1 has had enough"):
        on_threads(ParallelSpec(**degrees), work)
    assert threading.active_count() == before
    assert len(dist.distributed_c10d._world.pg_map) == groups
