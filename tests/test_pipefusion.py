"""PipeFusion on one rank and on many: the oracle's numbers, bit for bit in fp64."""

from __future__ import annotations

import gc
import sys
import weakref
from unittest import mock

import oracle
import pytest
import torch
from programs import flow_program
from ranks import Ranks, plain_denoise, tiny_call, tiny_model
from staged import PROGRAMS, run_pipefusion, sampled, sampling_job, staged_model

from comfy_xdit.parallel.once import OncePerEvaluation
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.stale import StaleAttention
from comfy_xdit.trajectory import Replay

MODELS = {
    "flux": {"family": "flux", "heads": 2, "layers": 2, "dtype": torch.float64},
    "sd3": {"family": "sd3", "heads": 2, "layers": 4, "dtype": torch.float64},
    "sd3.5": {"family": "sd3", "heads": 2, "layers": 4, "dtype": torch.float64, "dual": True},
    "pixart": {"family": "pixart", "heads": 2, "layers": 4, "dtype": torch.float64},
    "alpha": {"family": "pixart", "heads": 2, "layers": 4, "dtype": torch.float64, "alpha": True},
}


def expected(model, job, degrees=None, **method):
    """The number of stages is no matter."""
    return oracle.emulate(tiny_model(**model), job, ParallelSpec(**{**(degrees or {}), "pipe": 1}), **method)


def assert_same(answer, want) -> None:
    samples, _, posted = answer
    assert torch.equal(samples, want[0])
    assert all(torch.equal(entry["denoised"], shown) for entry, shown in zip(posted, want[1], strict=True))


@pytest.mark.parametrize("sampler", PROGRAMS)
@pytest.mark.parametrize("kind", MODELS)
def test_one_rank_equals_the_oracle(kind, sampler) -> None:
    model = MODELS[kind]
    job = sampling_job(model, PROGRAMS[sampler](), masked=sampler == "ancestral")
    for num_patches, warmup_steps in ((1, 1), (2, 1), (3, 2), (5, 1)):
        method = {"num_patches": num_patches, "warmup_steps": warmup_steps}
        assert_same(run_pipefusion(model, job, {}, **method), expected(model, job, **method))


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request):
    with Ranks(request.param) as started:
        yield started


def run(ranks, degrees, model, job, **method):
    """Rank 0's answer; the others' have no result."""
    arguments = {"model": model, "job": job, "degrees": degrees, **method}
    answers = ranks.run("run_of", module="staged", function="run_pipefusion", arguments=arguments)
    assert all(samples is None and posted == [] for samples, _, posted in answers[1:])
    return answers[0]


METHODS = ((4, 1), (1, 1), (3, 2), (5, 3))


def check_stages(ranks, kind, sampler, num_patches, warmup_steps, **options) -> None:
    model = MODELS[kind]
    job = sampling_job(model, PROGRAMS[sampler](), **options)
    method = {"num_patches": num_patches, "warmup_steps": warmup_steps}
    answer = run(ranks, {"pipe": ranks.num_ranks}, model, job, **method)
    assert_same(answer, expected(model, job, **method))


@pytest.mark.parametrize("sampler", PROGRAMS)
def test_stages_equal_the_oracle_for_each_sampler(ranks, sampler) -> None:
    """Which model, how many patches and warm-up steps go with it differs by sampler and stages."""
    number = list(PROGRAMS).index(sampler) + ranks.num_ranks
    kind = sorted(MODELS)[number % len(MODELS)]
    check_stages(ranks, kind, sampler, *METHODS[number % 4], masked=number % 2 == 0)


@pytest.mark.parametrize(("num_patches", "warmup_steps"), METHODS)
@pytest.mark.parametrize("kind", ["flux", "sd3.5", "alpha"])
def test_stages_equal_the_oracle_for_each_cut(ranks, kind, num_patches, warmup_steps) -> None:
    """Odd sizes: rows that no number of patches divides, a last row that is half beyond the latent."""
    check_stages(ranks, kind, "multistep with noise", num_patches, warmup_steps, size=(11, 5), texts=(4, 4), batch=2)


@pytest.mark.parametrize("kind", MODELS)
def test_what_sees_no_streams_tokens_is_computed_once_an_evaluation(kind) -> None:
    """Modulations, or keys of a text that is no stream; for each batch. Nothing is left on the model."""
    options = MODELS[kind]
    # The second text makes a batch of its own.
    job = sampling_job(options, flow_program(steps=4, cfg=2.5), texts=(5, 3))
    model = staged_model(**options)
    name = "attn2.to_k" if options["family"] == "pixart" else "norm1.linear"
    modulation, calls = model.module.get_submodule(f"transformer_blocks.0.{name}"), []
    forward = type(modulation).forward

    def counted(linear, x):
        calls.append(linear)
        return forward(linear, x)

    with mock.patch.object(type(modulation), "forward", counted):
        sampled(model, job, ParallelSpec(), num_patches=3)
    assert calls.count(modulation) == 2 * 4
    # What works on tokens works for each patch.
    assert calls.count(model.module.proj_out) > 2 * 4
    assert "forward" not in vars(modulation)


def test_a_modulation_that_differs_by_patch_is_a_fault_that_names_it() -> None:
    """As of a model that modulates each token by itself."""
    model = staged_model(**MODELS["sd3"])
    block, forward = model.module.transformer_blocks[1], type(model.module.transformer_blocks[1]).forward

    def modulated(self, hidden_states, encoder_hidden_states, temb, **others):
        own = hidden_states.sum() if self is block else 0
        return forward(self, hidden_states, encoder_hidden_states, temb + own, **others)

    job = sampling_job(MODELS["sd3"], flow_program(steps=4), size=(12, 8))
    with (
        mock.patch.object(type(block), "forward", modulated),
        pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.norm1\S* was given other numbers by patches"),
    ):
        sampled(model, job, ParallelSpec(), num_patches=3)


def test_an_input_of_another_shape_is_computed() -> None:
    model = staged_model(**MODELS["sd3"])
    linear = model.module.transformer_blocks[0].norm1.linear
    once = OncePerEvaluation(model.module, model.family.plan)
    with once:
        once.begin(0, "rows")
        for tokens in (1, 3, 1):
            x = torch.ones(1, tokens, linear.in_features, dtype=torch.float64)
            assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
        once.settle()
    assert "forward" not in vars(linear)


def test_texts_of_different_length(ranks) -> None:
    """They make no batch: two batches, each with buffers of its own."""
    for kind in ("flux", "pixart"):
        model = MODELS[kind]
        job = sampling_job(model, PROGRAMS["multistep"](), texts=(7, 3))
        method = {"num_patches": 3, "warmup_steps": 1}
        answer = run(ranks, {"pipe": ranks.num_ranks}, model, job, **method)
        assert_same(answer, expected(model, job, **method))


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_all_steps_warm_up_is_the_serial_result(ranks, kind) -> None:
    model = MODELS[kind]
    job = sampling_job(model, PROGRAMS["multistep"](), masked=True)
    serial = serial_result(model, job)
    for method in ({"warmup_steps": 100}, {"warmup_steps": 1, "stale": False}):
        samples, _, _ = run(ranks, {"pipe": ranks.num_ranks}, model, job, **method)
        assert (samples - serial).abs().max() <= 1e-12 * serial.abs().max()
    stale, report, _ = run(ranks, {"pipe": ranks.num_ranks}, model, job)
    assert report["num_patches"] == min(ranks.num_ranks + 1, 5)
    drift = (stale - serial).abs().max() / serial.abs().max()
    sys.stdout.write(f"\ndrift of {ranks.num_ranks} stages, {report['num_patches']} patches, warm-up 1: {drift:.2e}\n")
    assert drift > 1e-9, "nothing was stale"


def serial_result(model, job):
    """Diffusers' own forward in the sampler's loop."""
    whole = tiny_model(**model)
    replay = Replay(
        job["program"], noise=job["noise"], latent=job["latent"], noises=job["noises"], mask=job["mask"],
        dtype=job["noise"].dtype,
    )
    for number, call in enumerate(job["program"].calls):
        x = replay.model_input(number)
        outputs = []
        for index in call.conds:
            row = {**job["conds"][index], "x": x, "timestep": torch.full((len(x),), call.timestep)}
            arguments = whole.family.inputs(dict(whole.module.config), row)
            outputs.append(whole.family.output(whole.module(**arguments, return_dict=False)[0], row))
        replay.answer(number, outputs)
        replay.previews(number)
    return replay.output()


def test_reference_images_and_the_number_of_stages(ranks) -> None:
    """The oracle has no references; but whatever the stages, the result is one rank's."""
    model = MODELS["flux"]
    job = sampling_job(model, PROGRAMS["euler"](), references=((6, 8), (3, 2)))
    alone = run_pipefusion(model, job, {}, num_patches=3)
    answer = run(ranks, {"pipe": ranks.num_ranks}, model, job, num_patches=3)
    assert torch.equal(answer[0], alone[0])
    exact, _, _ = run_pipefusion(model, job, {}, stale=False)
    serial = serial_result(model, job)
    assert (exact - serial).abs().max() <= 1e-12 * serial.abs().max()
    assert 1e-9 < (alone[0] - serial).abs().max() <= 0.2 * serial.abs().max()


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_cancelled_job_leaves_the_groups_usable(ranks, stop_after) -> None:
    """Whichever stage wishes it (all do here, at different times), all stop after the same evaluation."""
    model = MODELS["flux"]
    degrees = {"pipe": ranks.num_ranks}
    job = sampling_job(model, flow_program(steps=30), size=(4, 4))
    arguments = {"model": model, "job": job, "degrees": degrees, "stop_after": stop_after}
    answers = ranks.run("run_of", module="staged", function="run_pipefusion", arguments=arguments)
    assert all(samples is None for samples, _, _ in answers)
    posted = answers[0][2]
    assert [entry["step"] for entry in posted] == list(range(1, len(posted) + 1))
    assert len(posted) <= stop_after + 3 and (len(posted) > 0) == (stop_after > 0)
    check_stages(ranks, "flux", "euler", 2, 1)


def test_refusals_come_from_every_rank(ranks) -> None:
    model = MODELS["flux"]
    good = sampling_job(model, PROGRAMS["euler"]())
    degrees = {"pipe": ranks.num_ranks}
    bad = {**good, "conds": [good["conds"][0], {**good["conds"][1], "guidance": None}]}
    for job, method, sentence in (
        (bad, {}, "needs a guidance value"),
        (good, {"num_patches": -1}, "use 1 or more, or 0 to have the number chosen"),
    ):
        arguments = {"model": model, "job": job, "degrees": degrees, **method}
        errors = ranks.run("run_of", module="staged", function="refusal", arguments=arguments)
        assert all(sentence in error for error in errors)
    check_stages(ranks, "flux", "euler", 2, 1)


def test_bytes_between_stages(ranks) -> None:
    """Each stage but the last sends its streams once an evaluation, the last the next input of the model."""
    for kind, hidden, text in (("sd3", 16, 5), ("pixart", 24, 0)):
        model = {**MODELS[kind], "dtype": torch.float32}
        job = sampling_job(model, flow_program(steps=6), size=(12, 8))
        arguments = {"model": model, "job": job, "degrees": {"pipe": ranks.num_ranks}, "num_patches": 3}
        answers = ranks.run("run_of", module="staged", function="run_pipefusion", arguments=arguments)
        sent = [report["bytes_sent"]["p2p"] for _, report, _ in answers]
        pixels = job["noise"][0, 0].numel()
        assert sent[:-1] == [6 * (pixels // 4 + text) * hidden * 4] * (ranks.num_ranks - 1)
        assert sent[-1] == (5 + 6 + 1) * 4 * pixels * 4, "inputs but the first, previews, the result"


def test_single_evaluations_are_exact(ranks) -> None:
    """Step mode: rows follow each other through the stages."""
    for kind in ("flux", "sd3.5", "alpha"):
        model = MODELS[kind]
        call = tiny_call(model["family"], seed=0, batch=3, size=(7, 6), text=5, dtype=torch.float64)
        (want,) = plain_denoise(model, [call])
        arguments = {"model": model, "calls": [call, call], "chunks": [1, 3], "degrees": {"pipe": ranks.num_ranks}}
        answers = ranks.run("run_of", module="staged", function="run_steps", arguments=arguments)
        assert all(outputs is None for outputs, _ in answers[1:])
        for out in answers[0][0]:
            assert (out - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize("ending", ["done", "cancelled", "failed"])
def test_buffers_end_with_the_job(ending) -> None:
    model = MODELS["sd3"]
    job = sampling_job(model, flow_program(steps=8), size=(12, 8))
    made = {}

    class Watched(StaleAttention):
        def _renewed(self, *args):
            pair = super()._renewed(*args)
            buffers = [x for layers in self._kept.values() for kept in layers.values() for x in kept]
            made.update({id(x): weakref.ref(x) for x in buffers})
            if ending == "failed" and len(made) == 8:
                raise RuntimeError("in mid-job")
            return pair

    with mock.patch("comfy_xdit.parallel.pipefusion.StaleAttention", Watched):
        if ending == "failed":
            with pytest.raises(RuntimeError, match="in mid-job"):
                run_pipefusion(model, job, {}, num_patches=3)
        else:
            stop_after = 2 if ending == "cancelled" else None
            samples, report, _ = run_pipefusion(model, job, {}, num_patches=3, stop_after=stop_after)
            assert (samples is None) == (ending == "cancelled")
            assert report["buffer_bytes"] == 4 * 2 * (24 + 5) * 16 * 8, "keys and values of four layers"
    gc.collect()
    assert len(made) == 8 and not any(buffer() is not None for buffer in made.values())


def test_exact_jobs_keep_no_buffers() -> None:
    model = MODELS["sd3"]
    job = sampling_job(model, flow_program(steps=3))
    for method in ({"stale": False}, {"warmup_steps": 3}):
        assert run_pipefusion(model, job, {}, **method)[1]["buffer_bytes"] == 0
