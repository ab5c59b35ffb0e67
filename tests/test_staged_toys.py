"""Pipeline stages of any module with a plan: equal to one rank, and what no stage could stand in for is refused."""

import dataclasses
import math

import pytest
import torch
from ranks import Ranks
from staged_toys import SEEDS, Ended, Ends, alone, one_stage, stageable
from token_toys import GRID, HEADS, JOINT, PAIR, WIDTH, call, toy_model

from comfy_xdit.errors import InputError
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.native.stage import keep_share
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.stages import Absent, block_costs, block_paths, keep_stage

CASES = {
    "a cut between two lists": ("joint", (2, 4), {}),
    "a cut in the first list": ("joint", (1, 4), {}),
    "a cut in the last list": ("joint", (3, 4), {"masked": True}),
    "three stages": ("joint", (1, 3, 4), {}),
    "two streams": ("pair", (2, 3), {}),
    "two streams, three stages": ("pair", (1, 2, 3), {}),
    "a stream without tokens": ("pair", (1, 3), {"audio": 0}),
    "blocks that attend themselves": ("line", (1, 2, 3), {}),
}

BESIDE = {
    "ulysses": ("joint", (2, 4), {"ulysses": 2}, {"masked": True}),
    "ulysses, a text shorter than the degree": ("joint", (1, 4), {"ulysses": 2}, {"text": 1}),
    "ring": ("joint", (3, 4), {"ring": 2}, {}),
    "ulysses, two streams": ("pair", (1, 3), {"ulysses": 2}, {}),
    "ring, a stream without tokens": ("pair", (2, 3), {"ring": 2}, {"audio": 0}),
    "ulysses, blocks that attend themselves": ("line", (2, 3), {"ulysses": 2}, {"height": 3}),
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two, Ranks(3) as three, Ranks(4) as four:
        yield {2: two, 3: three, 4: four}


def staged(ranks, toy, degrees, ends, sizes, like):
    num = math.prod((len(ends), *degrees.values()))
    named = {"toy": toy, "degrees": {"pipe": len(ends), **degrees}, "ends": ends, "sizes": sizes, "like": like}
    return ranks[num].run("run_of", module="staged_toys", function="run_staged", arguments=named)


def num_tokens(toy, sizes):
    """Of all streams, which a stage's messages hold."""
    if toy == "line":
        return 9 * sizes.get("height", 2)
    return 11 + sizes.get("text", 5) if toy == "joint" else 12 + sizes.get("audio", 7)


@pytest.mark.parametrize("case", CASES)
def test_stages_equal_one_rank_to_the_bit(ranks, case):
    toy, ends, sizes = CASES[case]
    expected = alone(toy, sizes, torch.float32)
    answers = staged(ranks, toy, {}, ends, sizes, expected)
    for number, (outs, sent, share) in enumerate(answers):
        assert all(torch.equal(out, expected) for out in outs)
        message = 2 * num_tokens(toy, sizes) * WIDTH * 4
        assert sent == (0 if number == len(ends) - 1 else 2 * len(SEEDS) * message)
        assert share < 0.8
    assert sum(share for _, _, share in answers) < 1.2


@pytest.mark.parametrize("case", BESIDE)
def test_stages_beside_other_methods(ranks, case):
    """Each rank passes its shards on, and all of it where there are too few tokens to cut."""
    toy, ends, degrees, sizes = BESIDE[case]
    expected = alone(toy, sizes, torch.float64)
    answers = staged(ranks, toy, degrees, ends, sizes, expected)
    for outs, _, _ in answers:
        assert max(((out - expected).norm() / expected.norm()).item() for out in outs) <= 1e-12
    message = 2 * num_tokens(toy, sizes) * WIDTH * 8
    in_all = sum(sent for _, sent, _ in answers)
    assert in_all == 2 * len(SEEDS) * message * (2 if "shorter" in case else 1)


def test_what_a_stage_does_not_get_is_no_number():
    """A model that looks back past its stage's first block, at another stage's: not a picture that is nearly right."""
    model = stageable("pair", torch.float64)
    blocks = model.blocks

    class LookingBack(torch.nn.Module):
        def forward(self, x, **kwargs):
            video, audio = blocks[2](blocks[1](first := blocks[0](x, **kwargs), **kwargs), **kwargs)
            return video + first[0], audio

    looking = LookingBack()
    looking.blocks = blocks
    arguments = call("pair")
    assert looking(arguments["x"], steps=arguments["steps"])[0].isfinite().all()
    with one_stage(looking, PAIR, range(2, 3), Ends(is_first=False, is_last=True)) as work:
        video, audio = looking(arguments["x"], steps=arguments["steps"], options={"override": work.attend})
    assert video.isnan().all() and audio.isfinite().all()


def test_the_attributes_of_other_stages_blocks_are_there():
    model = toy_model("pair")
    keep_stage(model, PAIR, range(1, 2))
    absent = model.blocks[0]
    assert isinstance(absent, Absent) and absent.strength == 0.7 and absent.own.q.weight.is_meta
    assert not [name for name, _ in model.named_parameters() if name.startswith(("blocks.0", "blocks.2"))]
    with pytest.raises(AttributeError, match="nothing"):
        absent.nothing  # noqa: B018


def test_blocks_that_take_turns_are_refused_by_name():
    with pytest.raises(InputError, match="Grid cannot be cut into pipeline stages"):
        one_stage(toy_model("grid"), GRID, range(2), Ends()).__enter__()
    plan = dataclasses.replace(GRID, in_order=True)
    model = toy_model("grid")
    said = r"side.0 runs where blocks.1 is due"
    with one_stage(model, plan, range(2), Ends()) as work, pytest.raises(RuntimeError, match=said):
        model(**call("grid"), options={"override": work.attend})


def joint(stage, ends, change):
    """Runs a changed toy in its stage."""
    model = toy_model("joint")
    change(model)
    with one_stage(model, JOINT, stage, ends) as work:
        model(**call("joint"), options={"override": work.attend})


def test_a_block_that_is_left_out_is_named():
    def skip(model):
        model.doubles.__class__ = type("Skipping", (torch.nn.ModuleList,), {"__iter__": lambda self: iter([self[0]])})

    with pytest.raises(RuntimeError, match=r"singles.0 runs where doubles.1 is due"):
        joint(range(2), Ends(), skip)


def test_a_last_block_that_is_left_out_is_named():
    def skip(model):
        model.singles.__class__ = type("Skipping", (torch.nn.ModuleList,), {"__iter__": lambda self: iter([self[0]])})

    with pytest.raises(RuntimeError, match=r"^singles.1 did not run"):
        joint(range(1, 4), Ends(is_first=False, is_last=True), skip)


def test_outputs_that_no_stage_could_stand_in_for_are_named():
    model = toy_model("pair")
    with (
        one_stage(model, PAIR, range(1), Ends()) as work,
        pytest.raises(RuntimeError, match=r"blocks.0 does not give \('x.0', 'x.1'\) alone"),
    ):
        model(**call("pair"), options={"override": work.attend})


def test_a_message_of_another_shape_is_named():
    def widen(model):
        model.doubles[0].register_forward_hook(lambda block, args, made: (made[0].float(), made[1]))

    with pytest.raises(RuntimeError, match=r"doubles.0 gives .*float32.*, and the next stage waits for .*float64"):
        joint(range(1), Ends(), widen)


def test_a_forward_ends_where_its_stage_does():
    ends, seen = Ends(), []

    def note(model):
        model.doubles[1].forward = lambda *args, **kwargs: seen.append("ran")

    with pytest.raises(Ended):
        joint(range(1), ends, note)
    image, text = ends.sent[0]
    assert image.shape == (2, 11, WIDTH) and text.shape == (2, 5, WIDTH) and not seen


def test_attention_past_the_engine_is_named_at_the_end_of_a_stage():
    def no_override(model):
        for block in model.doubles:
            block.attn.seam = "sdpa"

    with pytest.raises(RuntimeError, match=r"doubles.0.attn went past the engine"):
        joint(range(1), Ends(), no_override)


def test_costs():
    """Double blocks have two outputs where single ones have one; a text's takes no time."""
    model = toy_model("joint")
    square = WIDTH * WIDTH
    weights = block_costs(model, JOINT, "memory")
    assert weights == [4 * square + 4 * WIDTH] * 4
    blocks = (dataclasses.replace(JOINT.blocks[0], light=("text.",)), JOINT.blocks[1])
    doubles, _, singles, _ = block_costs(model, dataclasses.replace(JOINT, blocks=blocks))
    assert singles - doubles == 15 * square


def test_a_stage_reads_its_own_blocks_weights_only():
    family = ComfyFamily(
        name="toy", title="Toy", kinds=("Toy",), plan=JOINT, num_heads=lambda transformer: HEADS, rows=()
    )
    named = toy_model("joint").state_dict()
    read = []
    for number in range(3):
        net = toy_model("joint")
        own, mine = keep_share(net, family, ParallelSpec(pipe=3).weights_of(number))
        kept = {key for key, weight in named.items() if mine(key, weight) is not None}
        assert kept == net.state_dict().keys()
        assert {"head.weight", "head.bias"} <= kept
        read.append([key for key in kept if not key.startswith("head")])
        assert {".".join(key.split(".")[:2]) for key in read[-1]} == {block_paths(net, JOINT)[block] for block in own}
    assert sorted(key for keys in read for key in keys) == sorted(key for key in named if not key.startswith("head"))
    with pytest.raises(InputError, match="4 blocks cannot make 5 stages; use 1 to 4"):
        keep_share(toy_model("joint"), family, ParallelSpec(pipe=5).weights_of(0))
    with pytest.raises(InputError, match="Toy cannot be cut into pipeline stages"):
        keep_share(toy_model("grid"), dataclasses.replace(family, plan=GRID), ParallelSpec(pipe=2).weights_of(0))
