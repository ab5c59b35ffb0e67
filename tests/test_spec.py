"""Degrees: faults as sentences, and the automatic choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit.parallel.spec import AXES, ModelShape, ParallelSpec, auto, check

FLUX = ModelShape(title="Flux.1", num_heads=24, num_blocks=57)


def test_all_faults_come_at_once() -> None:
    spec = ParallelSpec(cfg=3, pipe=60, ulysses=30, tensor=5)
    faults = check(spec, num_ranks=4, shape=FLUX)
    for sentence in (
        "cfg=3 × pipe=60 × ulysses=30 × tensor=5 makes 27000 ranks, "  # noqa: RUF001
        "but the pool has 4; use degrees whose product is 4",
        "cfg=3 is more than cond and uncond; use 1 or 2",
        "tensor=5 cannot cut Flux.1's 24 heads evenly; use 1, 2, 3, 4, 6, 8, 12 or 24",
        "ulysses=30 cannot cut Flux.1's 24 heads with tensor=5; use 4 or less",
        "pipe=60 cannot cut Flux.1's 57 blocks; use 57 or less",
    ):
        assert sentence in faults


def test_ulysses_beyond_the_heads() -> None:
    assert check(ParallelSpec(ulysses=30), num_ranks=30, shape=FLUX) == [
        "ulysses=30 cannot cut Flux.1's 24 heads; use 24 or less"
    ]
    assert check(ParallelSpec(ulysses=24), num_ranks=24, shape=FLUX) == []


@pytest.mark.parametrize("degree", [0, -1, 1.0, True, "2"])
def test_a_degree_is_a_positive_whole_number(degree: object) -> None:
    with pytest.raises(ValueError, match="is not a degree; use a whole number, 1 or more"):
        ParallelSpec(ulysses=degree)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_ranks", "requested", "num_chunks", "heads", "chosen"),
    [
        (1, {}, 2, 24, {}),
        (2, {}, 2, 24, {"cfg": 2}),
        (2, {}, 1, 24, {"ulysses": 2}),
        (4, {}, 2, 24, {"cfg": 2, "ulysses": 2}),
        (3, {}, 2, 24, {"ulysses": 3}),
        (8, {}, 2, 2, {"cfg": 2, "ulysses": 2, "ring": 2}),
        (5, {}, 1, 2, {"ring": 5}),
        (4, {"ring": 4}, 2, 24, {"ring": 4}),
        (4, {"cfg": 1, "ulysses": 0}, 2, 24, {"ulysses": 4}),
        (6, {"ulysses": 1, "ring": 1}, 2, 24, {"cfg": 2, "dp": 3}),
    ],
)
def test_auto(num_ranks: int, requested: dict, num_chunks: int, heads: int, chosen: dict) -> None:
    shape = ModelShape(title="A", num_heads=heads, num_blocks=4)
    assert auto(num_ranks, requested=requested, shape=shape, num_chunks=num_chunks) == ParallelSpec(**chosen)


@pytest.mark.parametrize(
    ("requested", "sentence"),
    [
        ({"ring": 3}, "ring=3 makes 3 ranks, which do not divide the pool's 4"),
        ({"ring": 1, "ulysses": 2, "cfg": 1, "dp": 1}, "ulysses=2 makes 2 ranks, but the pool has 4"),
        ({"ulises": 2}, "'ulises' is no parallel method; use dp, cfg, pipe, distri, ring, ulysses and tensor"),
        ({"ulysses": -1}, "ulysses=-1 is not a degree"),
    ],
)
def test_auto_says_why_not(requested: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        auto(4, requested=requested, shape=FLUX)
    assert sentence in str(error.value)


@given(
    num_ranks=st.integers(1, 64),
    requested=st.dictionaries(st.sampled_from(["dp", "cfg", "ring", "ulysses"]), st.integers(0, 8)),
    heads=st.integers(1, 30),
    num_chunks=st.integers(1, 3),
)
def test_auto_is_valid_and_keeps_what_was_requested(
    num_ranks: int, requested: dict, heads: int, num_chunks: int
) -> None:
    shape = ModelShape(title="A", num_heads=heads, num_blocks=4)
    try:
        spec = auto(num_ranks, requested=requested, shape=shape, num_chunks=num_chunks)
    except ValueError:
        # Free axes take whatever is left, so only a request can be at fault.
        assert any(requested.values())
        return
    assert check(spec, num_ranks=num_ranks, shape=shape) == []
    assert all(getattr(spec, axis) == degree for axis, degree in requested.items() if degree)
    assert set(spec.degrees) == set(AXES)


def test_degrees_that_are_all_1_are_told_as_such():
    requested = dict.fromkeys(AXES, 1)
    with pytest.raises(ValueError, match=r"all degrees are 1, but the pool has 2 workers; set one to 0 \(chosen\)"):
        auto(2, requested=requested)
    assert auto(1, requested=requested) == ParallelSpec()
