"""Whole-shaped shards: a toy module's output on several ranks is that of one, and no line of a plan is idle."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from token_toys import GRID, JOINT, PAIR, TOYS, call, lines, toy_model

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.context import Axis, ParallelContext
from comfy_xdit.parallel.groups import GroupCache, Line
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.token_shards import TokenShards
from comfy_xdit.parallel.tokens import Attention, Blocks, Index, Ranges, TokenPlan, Tokens
from comfy_xdit.parallel.whole_shaped import whole_shaped

DEGREES = [{"ulysses": 2}, {"ring": 3}, {"ulysses": 2, "ring": 2}]
CASES = {
    "joint": ("joint", {}),
    "joint, masked": ("joint", {"masked": True}),
    "joint, a text shorter than the degree": ("joint", {"text": 1}),
    "called by its name": ("called", {}),
    "pair": ("pair", {}),
    "pair, an audio shorter than the degree": ("pair", {"audio": 1}),
    "pair, no audio": ("pair", {"audio": 0}),
    "grid": ("grid", {}),
    "grid, cut unevenly": ("grid", {"height": 3}),
}


@pytest.fixture(scope="module", params=DEGREES, ids=["ulysses 2", "ring 3", "ulysses 2, ring 2"])
def spread(request):
    """Started ranks, and their degrees."""
    num = 1
    for degree in request.param.values():
        num *= degree
    with Ranks(num) as started:
        yield started, request.param


def asked(started, function, **arguments):
    return started.run("run_of", module="token_toys", function=function, arguments=arguments)


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def whole(toy, sizes):
    with torch.inference_mode():
        return toy_model(toy)(**call(toy, **sizes))


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one(spread, case):
    started, degrees = spread
    toy, sizes = CASES[case]
    expected = whole(toy, sizes)
    for outs, sent in asked(started, "run_toy", toy=toy, degrees=degrees, sizes=sizes):
        assert max(error(out, expected) for out in outs) <= 1e-12
        assert bool(sent) == ("shorter" not in case)


@pytest.mark.parametrize("toy", TOYS)
def test_no_line_of_a_plan_is_idle(toy):
    sizes = {"masked": True}
    expected = whole(toy, sizes)
    with Ranks(2) as started:
        answers = asked(started, "run_damaged", toy=toy, degrees={"ulysses": 2}, sizes=sizes)
    for what, _ in lines(toy):
        outs = [answer[what] for answer in answers]
        assert any(out is None or error(out, expected) > 1e-3 for out in outs), f"{toy} without {what}"


def test_what_a_plan_refuses_is_refused_in_its_words():
    with Ranks(2) as started:
        said = asked(started, "refusal", toy="pair", degrees={"ulysses": 2}, sizes={}, guide=1)
    assert said == ["InputError: guides are not for several GPUs; take them off"] * 2


@contextlib.contextmanager
def alone(toy, plan):
    model = toy_model(toy)
    context = ParallelContext(ParallelSpec(), GroupCache(1))
    with torch.inference_mode(), whole_shaped(model, plan, context) as work:
        yield model, work


def test_attention_that_went_past_is_named():
    with alone("pair", PAIR) as (model, _), pytest.raises(RuntimeError, match=r"blocks\.0\.own went past the engine"):
        model(**call("pair"))  # no override


def test_a_module_that_did_not_run_is_named():
    with alone("joint", JOINT) as (model, work):
        model.singles[1].forward = lambda x, pe, place, **further: x
        with pytest.raises(RuntimeError, match=r"singles\.1\.attn\.0 went past the engine: it ran 0 times"):
            model(**call("joint"), options={"override": work.attend})


def test_a_call_too_few_is_named():
    with alone("grid", GRID) as (model, work):
        model.side[0].num = 1
        with pytest.raises(RuntimeError, match=r"side\.0 went past the engine: 1 calls reached it, not 2"):
            model(**call("grid"), options={"override": work.attend})


def test_attention_outside_of_the_blocks_is_named():
    plan = dataclasses.replace(GRID, attention={**GRID.attention, "head": Attention(("all",))})
    with (
        alone("grid", plan) as (model, work),
        pytest.raises(RuntimeError, match="head runs outside of the plan's blocks"),
    ):
        model(**call("grid"), options={"override": work.attend})


def test_tensors_that_a_plan_calls_untouched_are_the_same_ones():
    """A model that does something between its blocks is refused, and not computed with a rank's own tokens."""
    plan = dataclasses.replace(PAIR, untouched=True)
    with Ranks(2) as started:
        said = asked(started, "refusal", toy="pair", degrees={"ulysses": 2}, sizes={}, plan=plan)
    assert all(each.startswith("RuntimeError: a block of blocks is given other tensors than") for each in said), said


def test_nothing_is_left_behind():
    with alone("joint", JOINT) as (model, work):
        model(**call("joint"), options={"override": work.attend})
    hooks = [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    assert not hooks
    assert torch.equal(model(**call("joint")), whole("joint", {}))
    assert F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4)).shape == (1, 1, 2, 4)


def test_a_plan_for_another_version_is_refused_by_name():
    blocks = Blocks(path="side", takes={"args.0": Tokens(("all",)), "frames": Tokens(("all",))}, gives=("args.0",))
    with pytest.raises(ValueError, match=r"Cube takes no \['frames'\]"):
        alone("grid", TokenPlan(blocks=(blocks,), attention={})).__enter__()
    with pytest.raises(ValueError, match=r"Grid has no blocks\.0\.outer"):
        alone(
            "grid", TokenPlan(blocks=GRID.blocks, attention={"blocks.0.outer": Attention(("all",))})
        ).__enter__()


def shards(index, degree, **lengths):
    """Of a rank that never sends."""
    line = Line(ranks=tuple(range(degree)), index=index, group=None)
    axis = Axis(name="sequence", line=line, groups=None, traffic=None)
    return TokenShards(axis=axis, lengths=lengths)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_ranges_and_places_say_of_each_token_what_the_whole_says(degree):
    both, ranges = ("text", "image"), [(0, 4, "a"), (4, 9, "b"), (9, None, "c")]
    kinds = list("aaaabbbbbccccc")
    for index in range(degree):
        part = shards(index, degree, text=5, image=9)
        tokens = [token for first, size in part.pieces(both) for token in range(first, first + size)]
        found = [None] * len(tokens)
        for first, end, what in part.narrow(ranges, Ranges(both)):
            found[first:end] = what * (end - first)
        assert found == [kinds[token] for token in tokens]
        assert part.narrow(7, Index(both)) == sum(token < 7 for token in tokens)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (torch.ones(1, 13), Tokens(("text", "image"))),
        (torch.ones(1, 15), Tokens(("text", "image"), spread=True)),
        ([(0, 15, 1)], Ranges(("text", "image"))),
        (True, Index(("text",))),
        ("abc", Tokens(("text",))),
    ],
)
def test_what_does_not_fit_is_refused(value, rule):
    with pytest.raises((ValueError, TypeError)):
        shards(0, 2, text=5, image=9).narrow(value, rule)


def test_a_stream_does_not_change_its_length():
    part = shards(0, 2, text=5)
    with pytest.raises(ValueError, match="6 tokens"):
        part.learn([(torch.ones(1, 6), Tokens(("text",)))])


def test_a_late_stream_that_is_too_short_is_refused():
    model = toy_model("grid")
    with torch.inference_mode(), whole_shaped(model, GRID, ParallelContext(ParallelSpec(), GroupCache(1))) as work:
        work.axis = shards(0, 4).axis
        work.shards, work.has_cut = shards(0, 4, image=9, text=3), True
        with pytest.raises(InputError, match="3 tokens of text cannot be cut for the 4 ranks"):
            work._need_enough()
