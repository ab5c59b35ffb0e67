"""Attention over ranks equals attention on one: any lengths, heads and masks; and the kernels under it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks

from comfy_xdit.parallel import flash, kernels
from comfy_xdit.parallel.attention import Places, merge
from comfy_xdit.parallel.sequence import shard_sizes, shard_starts

DEGREES = {
    2: [{"ulysses": 2}, {"ring": 2}],
    3: [{"ulysses": 3}, {"ring": 3}],
    4: [{"ulysses": 4}, {"ring": 4}, {"ulysses": 2, "ring": 2}],
}


def plain(q, k, v, mask=None):
    """Attention by its definition, in fp64; a row that sees nothing is 0, its LSE -inf."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    weights = torch.nan_to_num((scores - lse[..., None]).exp(), nan=0.0)
    return weights @ v, lse


def random_qkv(seed, batch, heads, length, dim, dtype=torch.float32, keys=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = (length, *[length if keys is None else keys] * 2)
    return [torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in lengths]


def random_mask(seed, kind, batch, heads, length):
    """Masks that leave some keys, some rows, or nothing to see."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = {"padding": (batch, 1, 1, length), "pairs": (1, 1, length, length), "heads": (batch, heads, 1, length)}
    seen = torch.rand(shape.get(kind, (1, 1, 1, length)), generator=generator) > 0.4
    if kind == "nothing":
        return torch.zeros(batch, 1, 1, length, dtype=torch.bool)
    if kind == "additive":
        return torch.zeros(1, 1, 1, length).masked_fill(~seen, -torch.inf) + torch.rand(length, generator=generator)
    return seen


@pytest.fixture(scope="module", params=sorted(DEGREES))
def ranks(request):
    with Ranks(request.param) as started:
        yield started


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    heads=st.integers(4, 7),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    dim=st.sampled_from([4, 5, 8]),
    kind=st.sampled_from([None, "padding", "pairs", "heads", "additive", "nothing"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_ranks_equal_one(ranks, data, seed, batch, heads, lengths, dim, kind, dtype) -> None:
    degrees = data.draw(st.sampled_from(DEGREES[ranks.num_ranks]))
    q, k, v = random_qkv(seed, batch, heads, sum(lengths), dim, dtype)
    mask = random_mask(seed, kind, batch, heads, sum(lengths))
    expected, _ = plain(q, k, v, mask)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    for out in ranks.run(
        "run_attention", q=q, k=k, v=v, lengths=tuple(lengths), mask=mask, degrees=degrees
    ):
        assert out.dtype == dtype
        assert (out - expected).abs().max() <= limit


@pytest.mark.parametrize("kind", [None, "padding", "heads", "pairs"])
def test_keys_of_other_streams(ranks, kind) -> None:
    """As video attends to audio: other lengths, of which a rank may hold nothing, and another number of streams."""
    for degrees in DEGREES[ranks.num_ranks]:
        for lengths, key_lengths in (((13,), (4, 5)), ((3, 8), (17,)), ((9,), (1,))):
            queries, keys = sum(lengths), sum(key_lengths)
            q, k, v = random_qkv(1, 2, 6, queries, 8, keys=keys)
            mask = random_mask(2, kind, 2, 6, max(queries, keys))
            mask = None if mask is None else mask[:, :, :queries, :keys]
            expected, _ = plain(q, k, v, mask)
            arguments = {"lengths": lengths, "key_lengths": key_lengths, "mask": mask, "degrees": degrees}
            for out in ranks.run("run_attention", q=q, k=k, v=v, **arguments):
                assert (out - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("count", [lambda rank, to: 7, lambda rank, to: (3 * rank + 2 * to) % 5, lambda rank, to: 0])
def test_an_exchange_is_the_same_on_one_machine_and_over_a_network(ranks, count) -> None:
    every = range(ranks.num_ranks)
    sizes = [[count(rank, to) for to in every] for rank in every]
    one, several = (ranks.run("run_exchange", sizes=sizes, num_local=number) for number in (len(sizes), 1))
    for index, ((near, near_bytes), (far, far_bytes)) in enumerate(zip(one, several, strict=True)):
        want = [1000.0 * rank + sum(row[:index]) + i for rank, row in enumerate(sizes) for i in range(row[index])]
        assert near.tolist() == far.tolist() == want
        assert near_bytes == far_bytes == 4 * (sum(sizes[index]) - sizes[index][index])


def test_an_additive_mask_of_another_dtype() -> None:
    """16 keys: what torch computes in whole vectors."""
    q, k, v = random_qkv(0, 1, 4, 16, 4, torch.float64)
    mask = random_mask(0, "additive", 1, 4, 16)
    assert mask.dtype == torch.float32
    assert (kernels.attention(q, k, v, mask=mask) - plain(q, k, v, mask)[0]).abs().max() <= 1e-12


def test_half_precision(ranks) -> None:
    for degrees in DEGREES[ranks.num_ranks]:
        q, k, v = random_qkv(0, 2, 5, 13, 8, torch.bfloat16)
        expected, _ = plain(q, k, v)
        outs = ranks.run("run_attention", q=q, k=k, v=v, lengths=(4, 9), mask=None, degrees=degrees)
        assert all((out - expected).abs().max() < 0.02 and out.dtype == torch.bfloat16 for out in outs)


@given(length=st.integers(0, 100), degree=st.integers(1, 12))
def test_shards_are_those_of_tensor_split(length: int, degree: int) -> None:
    sizes = shard_sizes(length, degree)
    assert sizes == [len(part) for part in torch.arange(length).tensor_split(degree)]
    assert shard_starts(sizes) == [sum(sizes[:rank]) for rank in range(degree)]


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3), degree=st.integers(1, 6))
def test_every_token_has_one_place(lengths: list[int], degree: int) -> None:
    places = Places.of(lengths, degree)
    tokens = places.tokens(range(degree), torch.device("cpu"))
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert [len(places.tokens([rank], torch.device("cpu"))) for rank in range(degree)] == places.sizes


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    queries=st.integers(0, 9),
    keys=st.integers(0, 9),
    dim=st.sampled_from([3, 8]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    masked=st.booleans(),
    kernel=st.sampled_from(["cpu", "math"]),
)
def test_lse_kernels(seed, queries, keys, dim, dtype, masked, kernel) -> None:
    q, k, v = random_qkv(seed, 2, 3, queries, dim, dtype)
    k, v = random_qkv(seed + 1, 2, 3, 1, dim, dtype, keys=keys)[1:]
    seen = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) > 0.6
    mask = seen if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "choose", lambda q, *, masked, lse: kernel if lse else "sdpa")
        patch.setattr(kernels, "MATH_LIMIT_BYTES", 100)
        out, lse = kernels.attention_with_lse(q, k, v, mask=mask)
        alone = kernels.attention(q, k, v, mask=mask)
    expected, expected_lse = plain(q, k, v, mask)
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.04}[dtype]
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(lse.double(), expected_lse, atol=limit, rtol=limit)
    torch.testing.assert_close(out.double(), expected, atol=limit, rtol=limit)
    torch.testing.assert_close(alone.double(), expected, atol=limit, rtol=limit)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3), dead=st.booleans())
def test_merged_blocks_equal_the_whole(seed: int, cuts: list[int], dead: bool) -> None:
    q, k, v = random_qkv(seed, 1, 2, 4, 8, torch.float64, keys=12)
    mask = torch.rand(1, 1, 4, 12, generator=torch.Generator().manual_seed(seed)) > (2 if dead else 0.6)
    bounds = [0, *sorted(cuts), 12]
    merged = None
    for begin, end in pairwise(bounds):
        piece = kernels.attention_with_lse(
            q, k[:, :, begin:end], v[:, :, begin:end], mask=mask[..., begin:end]
        )
        merged = piece if merged is None else merge(*merged, *piece)
    assert merged is not None
    for got, expected in zip(merged, plain(q, k, v, mask), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("device", "major", "dtype", "dim", "masked", "lse", "installed", "expected"),
    [
        ("cpu", 0, torch.bfloat16, 64, False, False, {3, 2}, "sdpa"),
        ("cpu", 0, torch.bfloat16, 64, False, True, {3, 2}, "cpu"),
        ("cuda", 9, torch.bfloat16, 64, False, False, {3, 2}, "flash-attn 3"),
        ("cuda", 9, torch.float16, 64, False, True, {2}, "flash-attn 2"),
        ("cuda", 8, torch.bfloat16, 64, False, True, {3}, "flash"),
        ("cuda", 10, torch.bfloat16, 64, False, False, set(), "sdpa"),
        ("cuda", 9, torch.bfloat16, 64, True, True, {3, 2}, "efficient"),
        ("cuda", 9, torch.float32, 64, False, True, {3, 2}, "efficient"),
        ("cuda", 9, torch.float64, 64, False, True, {3, 2}, "math"),
        ("cuda", 9, torch.bfloat16, 60, False, True, {3, 2}, "math"),
        ("cuda", 7, torch.float16, 64, False, True, {3, 2}, "efficient"),
        ("cuda", 7, torch.bfloat16, 64, False, True, {3, 2}, "math"),
        ("mps", 0, torch.float16, 64, False, True, set(), "math"),
    ],
)
def test_choice_of_kernel(monkeypatch, device, major, dtype, dim, masked, lse, installed, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    usable = {f"flash-attn {number}" for number in installed}
    monkeypatch.setattr(flash, "usable", lambda name, device, dtype: print if name in usable else None)
    q = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 3, dim))
    assert kernels.choose(q, masked=masked, lse=lse) == expected
