"""N ranks equal one: tiny random models of each family under dp, cfg, ulysses, ring, distri and their products.

The expected output is diffusers' own forward, without our engine.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks, groups, plain_denoise, run_denoise, tiny_call, tiny_model

from comfy_xdit.models import FAMILIES
from comfy_xdit.models.flux import FLUX
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.cut import cut
from comfy_xdit.parallel.paths import find
from comfy_xdit.parallel.spec import ParallelSpec

LIMIT = 1e-5

DEGREES = {
    2: [{"ulysses": 2}, {"ring": 2}, {"distri": 2}, {"cfg": 2}, {"dp": 2}],
    3: [{"ulysses": 3}, {"ring": 3}, {"distri": 3}, {"dp": 3}],
    4: [
        {"ulysses": 4},
        {"ring": 4},
        {"dp": 4},
        {"ring": 2, "ulysses": 2},
        {"distri": 2, "ulysses": 2},
        {"distri": 2, "ring": 2},
        {"cfg": 2, "ulysses": 2},
        {"cfg": 2, "ring": 2},
        {"dp": 2, "cfg": 2},
        {"dp": 2, "ulysses": 2},
        {"dp": 2, "ring": 2},
    ],
}

MODELS = {
    "flux": {"family": "flux", "guidance": True},
    "flux without guidance": {"family": "flux", "guidance": False},
    "sd3": {"family": "sd3"},
    "sd3.5": {"family": "sd3", "dual": True},
    "pixart": {"family": "pixart"},
    "alpha": {"family": "pixart", "alpha": True},
}


@pytest.fixture(scope="module", params=sorted(DEGREES))
def ranks(request):
    with Ranks(request.param) as started:
        yield started


def assert_equal(ranks, model, calls, chunks, degrees) -> None:
    expected = plain_denoise(model, calls)
    answers = ranks.run("run_denoise", model=model, calls=calls, chunks=chunks, degrees=degrees)
    assert all(outputs is None for outputs, _ in answers[1:])
    outputs, _ = answers[0]
    assert len(outputs) == len(calls)
    for out, want, call in zip(outputs, expected, calls, strict=True):
        assert out.shape == call["x"].shape
        assert (out - want).abs().max() <= LIMIT * want.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_each_product_of_degrees(ranks, kind) -> None:
    """Five heads, which no degree here divides; odd text and image."""
    model = {**MODELS[kind], "heads": 5}
    call = tiny_call(model["family"], seed=0, batch=2, size=(9, 10), text=7)
    for degrees in DEGREES[ranks.num_ranks]:
        assert_equal(ranks, model, [call], [2], degrees)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(MODELS)),
    heads=st.integers(4, 6),
    batch=st.integers(1, 3),
    chunks=st.integers(1, 2),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    texts=st.lists(st.integers(1, 9), min_size=1, max_size=2),
)
def test_any_shape(ranks, data, kind, heads, batch, chunks, size, texts) -> None:
    degrees = data.draw(st.sampled_from(DEGREES[ranks.num_ranks]))
    model = {**MODELS[kind], "heads": heads}
    calls = [
        tiny_call(model["family"], seed=seed, batch=batch * chunks, size=size, text=text)
        for seed, text in enumerate(texts)
    ]
    assert_equal(ranks, model, calls, [chunks] * len(calls), degrees)


@pytest.mark.parametrize("kind", ["flux", "sd3.5"])
def test_fewer_tokens_than_ranks(ranks, kind) -> None:
    """One image token and one of text: some ranks hold nothing."""
    model = {**MODELS[kind], "heads": 4}
    calls = [tiny_call(model["family"], seed=0, batch=1, size=(2, 1), text=1)]
    for degrees in DEGREES[ranks.num_ranks]:
        assert_equal(ranks, model, calls, [1], degrees)


def test_calls_of_different_text_length_run_side_by_side(ranks) -> None:
    """The conditional and the unconditional call go to one cfg (or dp) rank each."""
    axis = {2: "cfg", 3: "dp", 4: "cfg"}[ranks.num_ranks]
    degrees = {axis: 3 if axis == "dp" else 2, **({"ulysses": 2} if ranks.num_ranks == 4 else {})}
    model = {**MODELS["flux"], "heads": 4}
    calls = [tiny_call("flux", seed=n, batch=1, size=(6, 6), text=text) for n, text in enumerate((9, 4))]
    assert_equal(ranks, model, calls, [1, 1], degrees)
    answers = ranks.run("run_denoise", model=model, calls=calls, chunks=[1, 1], degrees=degrees)
    assert sorted(report["rows"] for _, report in answers)[-2:] == [1, 1]


def test_masks_and_reference_images(ranks) -> None:
    """A mask over all pairs of tokens (text, then image); an odd-sized reference beside the image."""
    model = {**MODELS["flux"], "heads": 5}
    masked = tiny_call("flux", seed=0, batch=2, size=(6, 6), text=5)
    masked["attention_mask"] = torch.randn(2, 14, 14, generator=torch.Generator().manual_seed(0))
    masked["attention_mask"][:, :, 1:3] = -torch.inf
    referring = tiny_call("flux", seed=1, batch=2, size=(6, 6), text=5)
    referring["ref_latents"] = [torch.randn(2, 4, 3, 5), torch.randn(1, 4, 4, 4)]
    for degrees in DEGREES[ranks.num_ranks]:
        assert_equal(ranks, model, [masked, referring], [2, 2], degrees)


@pytest.mark.parametrize("kind", ["sd3.5", "alpha"])
def test_fp64(ranks, kind) -> None:
    """Nothing on the way rounds to fp32."""
    model = {**MODELS[kind], "heads": 4, "dtype": torch.float64}
    call = tiny_call(model["family"], seed=0, batch=2, size=(6, 8), text=5, dtype=torch.float64)
    expected = plain_denoise(model, [call])[0]
    for degrees in DEGREES[ranks.num_ranks]:
        ((out,), _), *_ = ranks.run("run_denoise", model=model, calls=[call], chunks=[2], degrees=degrees)
        assert (out - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_bytes_sent(ranks) -> None:
    """Ulysses with lengths and heads that divide: each layer sends 4/N of the activations, less its own share."""
    num_ranks = ranks.num_ranks
    model = {"family": "sd3", "heads": 12}
    call = tiny_call("sd3", seed=0, batch=1, size=(12, 12), text=12)
    answers = ranks.run(
        "run_denoise", model=model, calls=[call], chunks=[1], degrees={"ulysses": num_ranks}
    )
    local = (36 + 12) * 12 * 8 * 4 // num_ranks
    for _, report in answers:
        assert report["bytes_sent"]["all_to_all"] == 2 * 4 * local * (num_ranks - 1) // num_ranks


def test_a_fault_in_one_call_reaches_every_rank(ranks) -> None:
    """All ranks refuse alike, none waits for another; the next job works."""
    degrees = {"dp": ranks.num_ranks}
    model = {**MODELS["flux"], "heads": 4}
    good = tiny_call("flux", seed=0, batch=1, size=(4, 4), text=3)
    bad = {**good, "guidance": None}
    errors = ranks.run("refusal_of", model=model, calls=[good, bad], chunks=[1, 1], degrees=degrees)
    assert all("needs a guidance value" in error for error in errors)
    assert_equal(ranks, model, [good], [1], degrees)


@pytest.mark.parametrize("kind", MODELS)
def test_one_rank_without_torch_distributed(kind) -> None:
    model = {**MODELS[kind], "heads": 4}
    call = tiny_call(model["family"], seed=0, batch=2, size=(5, 6), text=7)
    outputs, report = run_denoise(model, [call], [2], {})
    assert torch.equal(outputs[0], plain_denoise(model, [call])[0])
    assert report["bytes_sent"] == {}


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_stays_on_the_module(kind) -> None:
    """No hook and no mode is left, also when the forward fails."""
    model = tiny_model(**MODELS[kind], heads=4)
    call = tiny_call(MODELS[kind]["family"], seed=0, batch=1, size=(4, 4), text=3)
    arguments = model.family.inputs(dict(model.module.config), call)
    name = "attn1" if model.family.name == "pixart" else "attn"
    ((_, attention),) = find(model.module, f"transformer_blocks.1.{name}")

    def fail(*args):
        raise RuntimeError("in attention")

    def count_hooks():
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules()
        )

    before = count_hooks()
    broken = attention.to_q.register_forward_hook(fail)
    with (
        ParallelContext(ParallelSpec(), groups()) as context,
        pytest.raises(RuntimeError, match="in attention"),
        cut(model.module, model.family.plan, context),
    ):
        model.module(**arguments)
    broken.remove()
    assert count_hooks() == before
    assert torch._C._len_torch_function_stack() == 0


def test_timesteps_keep_their_precision_in_bfloat16() -> None:
    """A bfloat16 Flux sees 731.3, not 732, to which diffusers' forward would round."""
    model = tiny_model("flux", heads=4, dtype=torch.bfloat16)
    call = tiny_call("flux", seed=0, batch=1, size=(4, 4), text=3, dtype=torch.bfloat16)
    call["timestep"] = torch.tensor([0.7313])
    seen = []
    model.module.time_text_embed.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.module(**FLUX.inputs(dict(model.module.config), call))
    assert seen[0].item() == pytest.approx(731.3)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_plans_name_what_exists(family) -> None:
    model = tiny_model(family.name, heads=4, dual=True)
    plan = family.plan
    for pattern in [*plan.attention, *plan.join, *(f"{blocks.path}.*" for blocks in plan.blocks)]:
        assert find(model.module, pattern), pattern
