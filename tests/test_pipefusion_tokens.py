"""Whole runs of PipeFusion on modules with a `TokenPlan`: what an emulation on whole tensors gives, for any stages."""

from __future__ import annotations

import sys

import pytest
import torch
from latent_toys import Double, Joined, Video, emulated, job_of, on_one, sampled
from programs import flow_program, heun_program, lonely_program

from comfy_xdit.parallel.sample import sample

CASES = {
    # Rows that no number of patches divides; the last ones are half beyond the latent.
    "a video, masked": (Video, lambda: job_of(flow_program(steps=4, cfg=2.5), (2, 3, 9, 5), masked=True), 3, 1),
    "texts of two lengths": (
        Double,
        lambda: job_of(flow_program(steps=5, cfg=2.5, kind="multistep"), (1, 10, 6), texts=(7, 4)),
        2,
        2,
    ),
    "text in the same stream": (
        Joined,
        lambda: job_of(heun_program(steps=3, cfg=2.5), (1, 1, 10, 6), texts=(4, 6)),
        2,
        1,
    ),
    "noise, and a row of tokens for each patch": (
        Double,
        lambda: job_of(flow_program(steps=4, noisy=True), (2, 5, 8)),
        3,
        1,
    ),
    "the negative is left out": (Joined, lambda: job_of(lonely_program(steps=6, cfg=2.5), (1, 8, 6)), 2, 1),
}


def error(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def checked(name, degrees):
    """The samples, once they are held to the emulation's."""
    block, job, num_patches, warmup_steps = CASES[name]
    job, method = job(), {"num_patches": num_patches, "warmup_steps": warmup_steps}
    answers = sampled(block, job, degrees, **method)
    samples, report, posted = answers[0]
    assert all(other is None and not shown for other, _, shown in answers[1:])
    expected, previews = emulated(block, job, **method)
    assert error(samples, expected) <= 1e-12
    assert max(error(entry["denoised"], shown) for entry, shown in zip(posted, previews, strict=True)) <= 1e-12
    assert report["num_patches"] == num_patches and report["buffer_bytes"] > 0
    return samples, error(samples, on_one(block, job))


@pytest.mark.parametrize("name", CASES)
def test_stages_equal_the_emulation(name):
    alone, drift = checked(name, {})
    for num_stages in (2, 3):
        assert torch.equal(checked(name, {"pipe": num_stages})[0], alone)
    sys.stdout.write(f"\n{name}: drift {drift:.1e}\n")
    assert 1e-4 < drift < 0.3


@pytest.mark.parametrize("name", ["a video, masked", "texts of two lengths", "text in the same stream"])
@pytest.mark.parametrize("beside", ["cfg", "dp", "ulysses", "ring"])
def test_beside_other_methods(name, beside):
    checked(name, {"pipe": 2, beside: 2})


@pytest.mark.parametrize("block", [Video, Double, Joined])
def test_where_all_is_warm_up_it_is_one_ranks_result(block):
    """To the bit where rows are not batched, for the model's own attention is used."""
    job = job_of(flow_program(steps=3), (1, 9, 6))
    for method in ({"warmup_steps": 100}, {"stale": False}):
        samples, report, _ = sampled(block, job, {"pipe": 3}, **method)[0]
        assert torch.equal(samples, on_one(block, job)) and report["buffer_bytes"] == 0


@pytest.mark.parametrize("is_known", [True, False])
def test_a_latent_whose_tokens_nobody_knows_is_not_cut(is_known):
    """Such a run is exact: its stages run empty after each evaluation."""
    job = job_of(flow_program(steps=4, cfg=2.5), (1, 2, 8, 6), texts=(4, 4))
    more = {"latent": lambda toy, call: None} if not is_known else {}
    samples, report, posted = sampled(Video, job, {"pipe": 2}, sample, more=more, num_patches=2)[0]
    drift = error(samples, on_one(Video, job))
    assert drift > 1e-4 if is_known else drift <= 1e-12
    assert ("num_patches" in report) == is_known and len(posted) == 4


def test_a_model_that_looks_at_its_latent_again_gives_no_picture():
    """The latent is on the first stage only; the last one has nothing like it."""
    job = job_of(flow_program(steps=3), (1, 8, 6))
    assert sampled(Double, job, {}, toy={"adds_x": 0.1})[0][0].isfinite().all()
    assert sampled(Double, job, {"pipe": 2}, toy={"adds_x": 0.1})[0][0].isnan().all()
