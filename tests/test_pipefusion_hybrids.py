"""PipeFusion beside the other methods: the oracle's numbers, bit for bit where its sums have the same order."""

from __future__ import annotations

import pytest
import tiny
import torch
from modes import Job
from ranks import Ranks
from staged import PROGRAMS, run_loaded, sampling_job
from test_pipefusion import assert_same, expected, run, serial_result

from comfy_xdit.parallel.spec import ParallelSpec

LIMIT = 1e-12
FLUX = {"family": "flux", "heads": 3, "layers": 2, "dtype": torch.float64}
SD3 = {"family": "sd3", "heads": 3, "layers": 2, "dtype": torch.float64, "dual": True}
PIXART = {"family": "pixart", "heads": 3, "layers": 2, "dtype": torch.float64, "alpha": True}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


@pytest.mark.parametrize("axis", ["ulysses", "ring", "cfg", "dp"])
@pytest.mark.parametrize("model", [FLUX, SD3, PIXART], ids=["flux", "sd3.5", "alpha"])
def test_two_stages_and_another_axis(ranks, axis, model) -> None:
    """Heads, tokens and rows that two does not divide; buffers meet the oracle's from the first stale step on."""
    batch = 3 if axis == "dp" else 1
    job = sampling_job(model, PROGRAMS["multistep with noise"](), size=(11, 6), batch=batch, masked=True)
    method = {"num_patches": 3, "warmup_steps": 1}
    degrees = {"pipe": 2, axis: 2}
    assert_same(run(ranks, degrees, model, job, **method), expected(model, job, degrees, **method))


@pytest.mark.parametrize("axis", ["ulysses", "ring", "cfg"])
@pytest.mark.parametrize("model", [FLUX, PIXART], ids=["flux", "alpha"])
def test_texts_of_different_length(ranks, axis, model) -> None:
    """Cond and uncond one after the other, or on a lane each; after steps without the negative one as well."""
    job = sampling_job(model, PROGRAMS["negative left out"](), texts=(7, 3), size=(8, 6))
    method = {"num_patches": 2, "warmup_steps": 1}
    degrees = {"pipe": 2, axis: 2}
    assert_same(run(ranks, degrees, model, job, **method), expected(model, job, degrees, **method))


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_warm_up_is_exact(ranks, axis) -> None:
    for model in (SD3, PIXART):
        job = sampling_job(model, PROGRAMS["euler"]())
        samples, _, _ = run(ranks, {"pipe": 2, axis: 2}, model, job, stale=False)
        want = serial_result(model, job)
        assert (samples - want).abs().max() <= LIMIT * want.abs().max()


def test_more_lanes_than_rows(ranks) -> None:
    """One lane has nothing to compute where there is one conditioning only."""
    job = sampling_job(FLUX, PROGRAMS["euler without cfg"]())
    method = {"num_patches": 2, "warmup_steps": 1}
    answer = run(ranks, {"pipe": 2, "cfg": 2}, FLUX, job, **method)
    assert_same(answer, expected(FLUX, job, **method))
    assert len(answer[2]) == 4


def test_masks_of_attention(ranks) -> None:
    """A mask over all pairs of tokens: rows of the patch, columns of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    job = sampling_job(FLUX, PROGRAMS["euler without cfg"](), size=(8, 6), texts=(4,))
    length = 4 + 4 * 3
    mask = torch.randn(1, length, length, generator=generator).double()
    mask[:, :, 1:3] = -torch.inf
    job["conds"][0]["attention_mask"] = mask
    exact = serial_result(FLUX, job)
    results = []
    for degrees in ({"pipe": 4}, {"pipe": 2, "ulysses": 2}, {"pipe": 2, "ring": 2}):
        samples, _, _ = run(ranks, degrees, FLUX, job, num_patches=2, stale=False)
        assert (samples - exact).abs().max() <= LIMIT * exact.abs().max()
        results.append(run(ranks, degrees, FLUX, job, num_patches=2)[0])
    assert all((result - results[0]).abs().max() <= LIMIT * exact.abs().max() for result in results)
    assert (results[0] - exact).abs().max() >= 1e-9


LOADED = {"flux": tiny.flux_shapes(), "sd3": tiny.sd3_shapes(depth=4), "pixart": tiny.pixart_shapes(depth=4)}


@pytest.mark.parametrize(("family", "shapes"), LOADED.items(), ids=LOADED)
def test_loaded_stages(ranks, tmp_path, family, shapes) -> None:
    """Each rank reads its blocks, or its shards of them, and no others."""
    path = tiny.write(tmp_path / "model.safetensors", tiny.random_weights(shapes, dtype=torch.float64))
    # Texts of two tokens and more for each patch, which two ranks can share.
    sizes = {"widths": (24, 20), "texts": (6, 6)}
    job = sampling_job({"family": family, "dtype": torch.float64}, PROGRAMS["multistep"](), **sizes)
    arguments = {"path": path, "family": family, "job": job, "num_patches": 3}
    alone, _, _ = run_loaded(degrees={}, **arguments)
    for degrees in ({"pipe": 4}, {"pipe": 2, "tensor": 2}, {"pipe": 2, "ulysses": 2}):
        job_of = {**arguments, "degrees": degrees}
        (samples, _, _), *_ = ranks.run("run_of", module="staged", function="run_loaded", arguments=job_of)
        assert (samples - alone).abs().max() <= LIMIT * alone.abs().max()
        assert torch.equal(samples, alone) or degrees != {"pipe": 4}


def test_a_text_that_no_rank_cuts_may_be_short(ranks) -> None:
    job = sampling_job(PIXART, PROGRAMS["euler"](), texts=(1, 1))
    degrees = {"pipe": 2, "ulysses": 2}
    assert_same(run(ranks, degrees, PIXART, job, num_patches=2), expected(PIXART, job, degrees, num_patches=2))


def test_too_few_tokens_for_the_sequence_axis(ranks) -> None:
    """Then nothing is cut: each rank computes its stage's patches whole."""
    job = sampling_job(FLUX, PROGRAMS["euler"](), texts=(1, 1))
    answer = run(ranks, {"pipe": 2, "ulysses": 2}, FLUX, job, num_patches=2)
    assert_same(answer, expected(FLUX, job, {"pipe": 2}, num_patches=2))


@pytest.mark.parametrize("introduced", [True, False])
@pytest.mark.parametrize("degrees", [{"pipe": 4}, {"pipe": 2, "ulysses": 2}, {"pipe": 2, "cfg": 2}], ids=str)
def test_stages_that_connect_at_their_first_message(ranks, degrees, introduced) -> None:
    """As with NCCL. Nobody waits for a rank that waits for it, also where groups were made without a greeting."""
    spec = ParallelSpec(**degrees)
    arguments = {"spec": spec, "job": Job.of("flux", spec)}
    at_once, *_ = ranks.run("run_of", module="modes", function="run_mode", arguments=arguments)
    lazily = {**arguments, "introduced": introduced, "wait_s": 30.0}
    (found, met), *_ = ranks.run("run_of", module="lazy", function="run_mode", arguments=lazily)
    assert met and found.keys() == at_once.keys()
    assert all(torch.equal(found[name], at_once[name]) for name in found)


def test_a_greeting_connects_the_pairs_that_a_pipeline_uses_and_no_others(ranks) -> None:
    spec = ParallelSpec(pipe=4)
    arguments = {"spec": spec, "job": Job.of("flux", spec), "wait_s": 30.0}
    used, greeted = (
        ranks.run("run_of", module="lazy", function="run_mode", arguments={**arguments, "introduced": introduced})
        for introduced in (False, True)
    )
    for rank, ((_, without), (_, with_greeting)) in enumerate(zip(used, greeted, strict=True)):
        # Groups have names of their own each time.
        assert len(without) == len(with_greeting) == 2, f"rank {rank}: {without} and {with_greeting}"
