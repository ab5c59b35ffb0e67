"""What `bench scaling` reports, on a model so small that only its correctness counts."""

import pytest
from comfy_xdit_bench.checkpoint import FluxSize
from comfy_xdit_bench.scaling import EXACT_LIMIT, METHODS, Settings, scaling
from comfy_xdit_bench.show import table
from comfy_xdit_bench.timing import take_turns

TINY = FluxSize(hidden=64, head_dim=16, double_blocks=1, single_blocks=2)


@pytest.fixture(scope="module")
def result():
    return scaling((64,), TINY, Settings(num_turns=1, num_evaluations=3))


def test_exact_methods_are_exact_and_the_others_near(result):
    differences = {row["method"]: row["difference"] for row in result["rows"]}
    near = {method: differences.pop(method) for method in ("pipe=2", "distri=2")}
    assert set(differences) | set(near) == {f"{axis}=2" for axis in METHODS}
    assert max(differences.values()) <= EXACT_LIMIT < min(near.values()) and max(near.values()) < 0.1
    exact = {row["method"]: (row["evaluations"], row["exact"]) for row in result["rows"]}
    parts = {row["method"]: (row["warm_up"], row["gain_after"]) for row in result["rows"]}
    assert parts["tensor=2"] == parts["cfg=2"] == (None, None)
    assert all(0 < parts[method][0] < 1 and parts[method][1] > 0 for method in near)
    assert exact["tensor=2"] == (3, 3) and exact["pipe=2"] == exact["distri=2"] == (3, 1) and exact["cfg=2"] == (1, 1)


def test_a_ranks_time_goes_somewhere(result):
    assert [(row["method"], row["rank"]) for row in result["ranks"]] == [
        (f"{axis}=2", rank) for axis in ("tensor", "pipe", "distri") for rank in (0, 1)
    ]
    for row in result["ranks"]:
        assert row["compute"] + row["communication"] + row["idle"] == pytest.approx(1) and row["compute"] > 0


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_run_that_is_all_warm_up_is_exact(chunks):
    settings = Settings(num_turns=1, num_evaluations=2, warmup_steps=2, methods=("pipe",), chunks=chunks)
    (row,) = scaling((64,), TINY, settings)["rows"]
    assert row["method"] == "pipe=2" and row["exact"] == 2 and row["difference"] <= EXACT_LIMIT
    # One row after the other through the stages, that pass their tensors on besides.
    assert 0 < row["predicted"] < (1, 4 / 3)[chunks - 1]


def test_further_rows_are_a_table_of_their_own():
    shown = table({"compared": "A", "rows": [{"a": 1.0, "b": None}], "ranks": [{"c": 2}], "ratio": 0.5})
    assert shown == "A\n\na  b\n1  -\n\nratio: 0.5\nranks:\nc\n2\n\n"


def test_turns_alternate_after_one_that_is_not_counted():
    seen = []
    contestants = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = take_turns(contestants, num_turns=2, warm={"a": lambda: seen.append("warm")})
    assert seen == ["warm", "a", "b", "b", "a"] and times["a"].num_turns == 2
