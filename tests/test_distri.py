"""DistriFusion on N ranks equals its emulation in one process bit for bit; exact where it should be."""

import itertools
import logging

import pytest
import tiny
import torch
from oracle import emulate
from programs import flow_program
from ranks import Ranks, run_denoise, run_sample, tiny_call, tiny_model

from comfy_xdit.messages import LoadModel
from comfy_xdit.parallel.spec import ModelShape, ParallelSpec, auto, check

log = logging.getLogger(__name__)

EXACT = 1e-12
HEADS = 5

PROGRAMS = {
    "euler": {"kind": "euler"},
    "multistep": {"kind": "multistep"},
    "noisy": {"kind": "euler", "noisy": True},
    "multistep with cfg": {"kind": "multistep", "cfg": 3.0},
}

MODELS = {
    "flux": {"family": "flux", "heads": HEADS, "dtype": torch.float64},
    "sd3.5": {"family": "sd3", "dual": True, "heads": HEADS, "dtype": torch.float64},
    "pixart": {"family": "pixart", "alpha": True, "heads": HEADS, "dtype": torch.float64},
}


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as started:
        yield started


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as started:
        yield started


def job(program, *, family="flux", texts=(7, 7), batch=1, size=(7, 6), seed=0, dtype=torch.float64):
    """Fields of a `Sample`: 12 image tokens, or those of `size`; odd texts."""
    calls = [
        tiny_call(family, seed=seed + index, batch=batch, size=size, text=texts[index], dtype=dtype)
        for index in range(len(program.conds))
    ]
    conds = [{name: value for name, value in call.items() if name not in ("x", "timestep")} for call in calls]
    generator = torch.Generator().manual_seed(seed)
    shape = (2 + len(program.calls), batch, 4, *tiny.picture(family, size))
    noise, latent, *noises = torch.randn(shape, generator=generator, dtype=dtype)
    return {"program": program, "noise": noise, "latent": latent, "noises": noises, "conds": conds}


def sampled(ranks, model, degrees, fields, **method):
    answers = ranks.run("run_sample", model=model, degrees=degrees, **fields, **method)
    assert all(samples is None for samples, _, _ in answers[1:])
    return answers[0][0]


def expected(model, fields, *, warmup_steps=1, **degrees):
    return emulate(tiny_model(**model), fields, ParallelSpec(**degrees), warmup_steps=warmup_steps)[0]


def difference(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_two_ranks_equal_the_emulation(two, kind, name) -> None:
    """Bit for bit, whatever the sampler and the warm-up; and stale keys do change the samples."""
    model = MODELS[kind]
    program = flow_program(steps=4, **PROGRAMS[name])
    fields = job(program, family=model["family"])
    serial, _, _ = run_sample(model, {}, **fields)
    for warmup_steps in (0, 1, 2):
        stale = sampled(two, model, {"distri": 2}, fields, warmup_steps=warmup_steps)
        assert torch.equal(stale, expected(model, fields, distri=2, warmup_steps=warmup_steps))
        drift = difference(stale, serial)
        log.info("%s, %s, %d exact evaluations: drift %.1e", kind, name, warmup_steps, drift)
        assert 1e-9 < drift < 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_four_ranks_equal_the_emulation(four, kind) -> None:
    """Some ranks hold a token more than others."""
    model = MODELS[kind]
    fields = job(flow_program(steps=3, kind="multistep", cfg=2.0), family=model["family"], size=(5, 10))
    stale = sampled(four, model, {"distri": 4}, fields)
    assert torch.equal(stale, expected(model, fields, distri=4))


@pytest.mark.parametrize("kind", MODELS)
def test_fresh_keys_within_a_group_of_ulysses_ranks(four, kind) -> None:
    """Five heads on two ranks: the buffers hold three heads here, two there."""
    model = MODELS[kind]
    fields = job(flow_program(steps=3, kind="multistep"), family=model["family"], size=(5, 10))
    stale = sampled(four, model, {"distri": 2, "ulysses": 2}, fields)
    assert torch.equal(stale, expected(model, fields, distri=2, ulysses=2))


def test_fresh_keys_within_a_ring(four) -> None:
    """A ring sums in another order, so all but the last bits are equal."""
    fields = job(flow_program(steps=3, kind="multistep"), size=(5, 10))
    stale = sampled(four, MODELS["flux"], {"distri": 2, "ring": 2}, fields)
    assert difference(stale, expected(MODELS["flux"], fields, distri=2, ring=2)) <= EXACT


@pytest.mark.parametrize("texts", [(7, 7), (9, 4)])
def test_each_conditioning_has_its_keys(two, four, texts) -> None:
    """As one batch, one call after another (texts of different lengths), or side by side on the cfg axis."""
    model = MODELS["flux"]
    fields = job(flow_program(steps=3, cfg=2.0), texts=texts)
    for ranks, degrees in ((two, {"distri": 2}), (four, {"cfg": 2, "distri": 2})):
        assert torch.equal(sampled(ranks, model, degrees, fields), expected(model, fields, **degrees))


def test_shards_of_weights_change_nothing(two, four, tmp_path) -> None:
    """With tensor parallel within: near to fp32's rounding what whole weights give, and as far from exact."""
    path = tiny.write(tmp_path / "flux.safetensors", tiny.random_weights(tiny.flux_shapes(heads=4, context=12, vec=10)))
    dtypes = {"storage_dtype": "float32", "compute_dtype": "float32"}
    load = LoadModel(model="m", path=str(path), prefix="", family="flux", **dtypes)
    fields = job(flow_program(steps=3), dtype=torch.float32)
    serial, _, _ = run_sample(load, {}, **fields)
    whole = sampled(two, load, {"distri": 2}, fields)
    assert difference(whole, serial) > 1e-4
    assert difference(sampled(four, load, {"distri": 2, "tensor": 2}, fields), whole) <= 1e-5


def test_each_image_of_a_batch_has_its_keys(four) -> None:
    fields = job(flow_program(steps=3), batch=2)
    fields["conds"] = [{name: value[:1] for name, value in cond.items()} for cond in fields["conds"]]
    stale = sampled(four, MODELS["flux"], {"dp": 2, "distri": 2}, fields)
    for row, image in enumerate(stale):
        alone = {
            **fields,
            "noise": fields["noise"][row : row + 1],
            "latent": fields["latent"][row : row + 1],
            "noises": [noise[row : row + 1] for noise in fields["noises"]],
        }
        assert torch.equal(image[None], expected(MODELS["flux"], alone, distri=2))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [{"stale": False}, {"warmup_steps": 3}], ids=["in step", "all warm-up"])
def test_exact_variants_equal_one_rank(two, four, kind, method) -> None:
    model = MODELS[kind]
    fields = job(flow_program(steps=3, kind="multistep", cfg=2.0), family=model["family"], size=(5, 10))
    serial, _, _ = run_sample(model, {}, **fields)
    for ranks, degrees in (
        (two, {"distri": 2}),
        (four, {"distri": 4}),
        (four, {"distri": 2, "ulysses": 2}),
        (four, {"distri": 2, "ring": 2}),
    ):
        assert difference(sampled(ranks, model, degrees, fields, **method), serial) <= EXACT


@pytest.mark.parametrize("kind", ["flux", "sd3.5"])
def test_fewer_tokens_than_ranks(four, kind) -> None:
    """Some ranks hold no token of the image, or none at all. (PixArt has no picture of so few.)"""
    model = MODELS[kind]
    fields = job(flow_program(steps=3, kind="multistep", cfg=2.0), family=model["family"], size=(2, 5), texts=(1, 1))
    serial, _, _ = run_sample(model, {}, **fields)
    for degrees in ({"distri": 4}, {"distri": 2, "ulysses": 2}, {"distri": 2, "ring": 2}):
        assert difference(sampled(four, model, degrees, fields, stale=False), serial) <= EXACT
        assert difference(sampled(four, model, degrees, fields), serial) < 0.5


def test_one_evaluation_at_a_time_is_exact(two, four) -> None:
    """Step mode knows of no evaluation before. With a mask over pairs of tokens, text first."""
    model = MODELS["flux"]
    call = tiny_call("flux", seed=0, batch=2, size=(5, 10), text=7, dtype=torch.float64)
    call["attention_mask"] = torch.randn(2, 22, 22, generator=torch.Generator().manual_seed(0)).double()
    call["attention_mask"][:, :, 1:3] = -torch.inf
    ((whole,), _) = run_denoise(model, [call], [2], {})
    for ranks, degrees in ((two, {"distri": 2}), (four, {"distri": 2, "ring": 2}), (four, {"distri": 2, "ulysses": 2})):
        (outputs, _), *_ = ranks.run("run_denoise", model=model, calls=[call], chunks=[2], degrees=degrees)
        assert difference(outputs[0], whole) <= EXACT


def test_drift_is_small_where_the_latent_changes_little(two) -> None:
    """Many steps, so that each changes little: the more steps and warm-up, the nearer to exact."""
    model = MODELS["flux"]
    drifts = {}
    for steps, warmup_steps in itertools.product((4, 16), (1, 3)):
        fields = job(flow_program(steps=steps))
        serial, _, _ = run_sample(model, {}, **fields)
        stale = sampled(two, model, {"distri": 2}, fields, warmup_steps=warmup_steps)
        drifts[steps, warmup_steps] = difference(stale, serial)
    log.info("drift by (steps, exact evaluations): %s", drifts)
    assert drifts[16, 1] < drifts[4, 1]
    assert all(drifts[steps, 3] < drifts[steps, 1] for steps in (4, 16))
    assert max(drifts.values()) < 0.1


def test_bytes_and_buffers(two) -> None:
    """Each layer's keys and values go to the other rank once an evaluation, none after the last one's use."""
    model = {"family": "flux", "heads": 4, "dtype": torch.float64}
    fields = job(flow_program(steps=3), texts=(8,), size=(8, 8))
    for method, num_sent in (({}, 2), ({"warmup_steps": 0}, 2), ({"stale": False}, 3), ({"warmup_steps": 3}, 3)):
        answers = two.run("run_sample", model=model, degrees={"distri": 2}, **fields, **method)
        layer = 2 * (8 + 16) // 2 * 4 * 8 * 8  # keys and values of half the tokens, four heads of 8 numbers
        output = 16 // 2 * 16 * 8
        for _, report, _ in answers:
            assert report["bytes_sent"] == {"all_gather": num_sent * 4 * layer + 3 * output}
            assert report["buffer_bytes"] == (3 * 4 * layer if num_sent == 2 else 0)


def test_buffers_do_not_outlive_the_job(two) -> None:
    fields = job(flow_program(steps=3))
    for stop_at in (None, 2):
        answers = two.run("buffers_left_by", model=MODELS["flux"], degrees={"distri": 2}, stop_at=stop_at, **fields)
        assert answers == [(4, 0), (4, 0)]
    # Also where the ranks stopped with keys under way, the next job works.
    stale = sampled(two, MODELS["flux"], {"distri": 2}, fields)
    assert torch.equal(stale, expected(MODELS["flux"], fields, distri=2))


def test_degrees() -> None:
    shape = ModelShape(title="Flux.1", num_heads=24, num_blocks=57)
    assert check(ParallelSpec(distri=4, ulysses=2), num_ranks=8, shape=shape) == []
    faults = check(ParallelSpec(distri=2, pipe=2), num_ranks=4, shape=shape)
    assert any("pipe=2 and distri=2 do not go together" in fault for fault in faults)
    assert auto(8, requested={}, shape=shape).distri == 1
    assert auto(8, requested={"distri": 2}, shape=shape) == ParallelSpec(distri=2, ulysses=4)
