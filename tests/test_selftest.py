"""The self-test on a toy: a plan that holds passes; one that doesn't is refused in words, as is what shows nothing."""

import dataclasses
import math

import latent_toys
import pytest
import test_sharded
import torch
from latent_toys import Double, Joined, Video
from token_toys import JOINT, PAIR, call, lines, toy_model

from comfy_xdit.native import selftest as under_test
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.native.selftest import LIMIT, SPECS, selftest, verdict
from comfy_xdit.native.subject import Subject, cases
from comfy_xdit.parallel.latent_tokens import LatentTokens
from comfy_xdit.parallel.spec import ParallelSpec


class Options(torch.nn.Module):
    """A toy whose options and places of arguments are those of ComfyUI's transformers."""

    def __init__(self, toy):
        super().__init__()
        self.toy, self.module = toy, toy_model(toy)

    def forward(self, x, timestep, transformer_options, **named):
        override = transformer_options.get("optimized_attention_override")
        return self.module(x, timestep, options={"override": override} if override else {}, **named)


def inside(plan):
    """The plan of a toy, for the module that holds it."""
    blocks = tuple(dataclasses.replace(blocks, path=f"module.{blocks.path}") for blocks in plan.blocks)
    attention = {f"module.{path}": rule for path, rule in plan.attention.items()}
    return dataclasses.replace(plan, blocks=blocks, attention=attention)


def family(plan):
    return ComfyFamily(name="toy", title="Toy", kinds=("Toy",), plan=inside(plan), num_heads=lambda toy: 6, rows=())


def toy_call(toy, **sizes):
    first, second, *rest = (found := call(toy, **sizes))
    return {"x": found[first], "timestep": found[second], **{name: found[name] for name in rest}}


def subject(toy, refused=None, **sizes):
    calls = {"masked": toy_call(toy, masked=True), "plain": toy_call(toy, **sizes)}
    return Subject(
        kind="Toy", config={"toy": toy}, small=("toy",), calls=lambda config: calls, refused=refused
    )


def with_latents(block, **more):
    """A family whose latents can be cut, and what it is tried on."""
    call = {"x": torch.randn(2, latent_toys.CHANNELS, 2, 9, 6).double(), "timestep": torch.tensor([0.7, 0.3])}
    call["context"] = torch.randn(2, 5, latent_toys.TEXT).double()
    calls = {"a video": call}
    of_toy = Subject(kind="Toy", config={"toy": block}, small=("toy",), calls=lambda config: calls)
    return latent_toys.family(block, **more), [of_toy]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    def build(kind, config):
        toy = config["toy"]
        return Options(toy) if isinstance(toy, str) else latent_toys.toy_of(toy)

    monkeypatch.setattr(under_test, "exists", lambda kind: kind == "Toy")
    monkeypatch.setattr(under_test, "build", build)


@pytest.mark.parametrize(("toy", "plan"), [("joint", JOINT), ("pair", PAIR)])
def test_a_plan_that_holds(toy, plan):
    outcomes = selftest(family(plan), [subject(toy)], SPECS)
    assert [outcome.call for outcome in outcomes][:2] == ["Toy masked on ulysses=2", "Toy masked on ring=3"]
    assert len(outcomes) == 4 and all(outcome.error <= 1e-12 and outcome.holds for outcome in outcomes)
    assert verdict(family(plan), outcomes, "1.2.3") == ""


GIVEN = ("doubles img", "doubles txt", "singles x")
"""Lines without which there is no plan."""


@pytest.mark.parametrize("what", [what for what, _ in lines("joint") if what not in GIVEN])
def test_a_damaged_line_is_refused(what):
    damaged = dict(lines("joint"))[what]()
    outcomes = selftest(family(damaged), [subject("joint")])
    assert "Toy is not run on several GPUs with ComfyUI 1.2.3" in verdict(family(damaged), outcomes, "1.2.3")


@pytest.mark.parametrize("block", [Video, Double, Joined])
def test_a_latent_that_is_cut_into_patches(block):
    *whole, in_patches = selftest(*with_latents(block))
    assert whole and in_patches.call == "Toy a video in patches"
    assert all(outcome.error <= 1e-12 for outcome in [*whole, in_patches])


MISPLACED = {
    "before the text": (Joined, lambda toy, call: LatentTokens.of(call["x"], "all", side=2)),
    "a row too late": (Video, lambda toy, call: LatentTokens.of(call["x"][..., :-2, :], "video", side=2, first=3)),
    "without frames": (Video, lambda toy, call: LatentTokens.of(call["x"][:, :, 0], "video", side=2)),
    "larger": (Video, lambda toy, call: LatentTokens.of(call["x"], "video", side=1)),
    "another stream's": (Double, lambda toy, call: LatentTokens.of(call["x"][..., :2, :], "text", side=2)),
}


@pytest.mark.parametrize("what", MISPLACED)
def test_a_latent_that_stands_elsewhere_is_refused(what):
    block, latent = MISPLACED[what]
    *whole, in_patches = selftest(*with_latents(block, latent=latent))
    assert all(outcome.holds for outcome in whole) and not in_patches.holds


def test_another_result_is_told_by_its_difference():
    damaged = dict(lines("pair"))["blocks steps"]()
    (outcome, *_) = selftest(family(damaged), [subject("pair")], [ParallelSpec(ulysses=2)])
    assert not outcome.holds and (outcome.why or LIMIT < outcome.error < math.inf)


def test_what_is_cut_nowhere_shows_nothing():
    outcomes = selftest(family(JOINT), [subject("joint", text=1)], [ParallelSpec(ulysses=2)])
    assert [outcome.why for outcome in outcomes] == ["", "ValueError: nothing was cut"]


def test_what_a_plan_refuses_must_be_refused():
    def refused(config):
        return {"guided": {**toy_call("pair"), "guide": 1}}

    spec = [ParallelSpec(ulysses=2)]
    assert all(outcome.holds for outcome in selftest(family(PAIR), [subject("pair", refused)], spec))
    takes = {name: rule for name, rule in PAIR.blocks[0].takes.items() if name != "guide"}
    open_plan = dataclasses.replace(PAIR, blocks=(dataclasses.replace(PAIR.blocks[0], takes=takes),))
    outcomes = selftest(family(open_plan), [subject("pair", refused)], spec)
    assert [outcome.why for outcome in outcomes if not outcome.holds] == ["it was not refused"]


def test_a_wrong_number_of_heads_is_told():
    wrong = dataclasses.replace(family(JOINT), num_heads=lambda toy: 12)
    (outcome,) = (outcome for outcome in selftest(wrong, [subject("joint")], SPECS) if not outcome.holds)
    assert outcome.why == "12 heads, of which attention has [6]"


def test_a_files_configuration_is_tried_once():
    """Subjects that differ in nothing else are one; those of other sizes are not."""
    real = {"Toy": {"toy": "joint", "flag": True}}
    twins = [subject("joint"), dataclasses.replace(subject("joint"), config={"toy": "joint", "flag": False})]
    assert len(selftest(family(JOINT), twins, SPECS, real=real)) == 4
    assert len(selftest(family(JOINT), twins, SPECS)) == 8
    made = [config for _, config in cases([*twins, subject("pair")], real)]
    assert made == [real["Toy"], {**real["Toy"], "toy": "pair"}]


def test_rows_are_tried_one_by_one():
    named = dataclasses.replace(family(JOINT), rows=("pe", "gain", "residual"))
    outcomes = selftest(named, [subject("joint")])
    by_rows = [outcome for outcome in outcomes if outcome.call.endswith("row by row, as on cfg and dp")]
    assert len(outcomes) == 6 and len(by_rows) == 2 and all(outcome.error <= 1e-12 for outcome in outcomes)
    wrong = dataclasses.replace(named, rows=("pe", "gain"), constants=("residual",))
    assert "row by row" in verdict(wrong, selftest(wrong, [subject("joint")]), "1.2.3")


def test_tensor_is_tried_where_there_is_a_plan_for_it(monkeypatch):
    def call():
        given = test_sharded.call()
        return {"x": given["x"], "timestep": given["vec"], "pe": given["pe"]}

    class Toy(test_sharded.Model):
        def forward(self, x, timestep, transformer_options, pe):
            return super().forward(x, timestep, pe, transformer_options)

    monkeypatch.setattr(under_test, "build", lambda kind, config: test_sharded.model(Toy))
    whole = dataclasses.replace(family(JOINT), plan=test_sharded.PLAN, num_heads=lambda toy: 8, rows=("pe",))
    outcomes = selftest(whole, [Subject(kind="Toy", config={}, small=(), calls=lambda config: {"plain": call()})])
    assert [outcome.call for outcome in outcomes][2:] == [
        "Toy plain on tensor=2",
        "Toy plain row by row, as on cfg and dp",
    ]
    assert all(outcome.error <= 1e-12 for outcome in outcomes)


def test_kinds_that_are_not_there_are_left_out():
    assert selftest(family(JOINT), [dataclasses.replace(subject("joint"), kind="Newer")]) == []
    assert selftest(family(JOINT), [subject("joint")], real={"Other": {}}) == []
