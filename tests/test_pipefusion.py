"""PipeFusion on one rank and on many: the oracle's numbers, bit for bit in fp64."""

from __future__ import annotations

import oracle
import pytest
import torch
from ranks import Ranks, tiny_model
from staged import PROGRAMS, run_pipefusion, sampling_job

MODELS = {
    "flux": {"family": "flux", "heads": 2, "layers": 2, "dtype": torch.float64},
    "sd3": {"family": "sd3", "heads": 2, "layers": 4, "dtype": torch.float64},
    "sd3.5": {"family": "sd3", "heads": 2, "layers": 4, "dtype": torch.float64, "dual": True},
}


def expected(model, job, **method):
    with torch.inference_mode():
        return oracle.pipefusion(tiny_model(**model), job, **method)


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


@pytest.mark.parametrize("sampler", PROGRAMS)
def test_stages_equal_the_oracle(ranks, sampler) -> None:
    kind = sorted(MODELS)[len(sampler) % 3]
    model = MODELS[kind]
    job = sampling_job(model, PROGRAMS[sampler](), masked=sampler == "ancestral")
    for num_patches, warmup_steps in ((1, 1), (4, 1), (3, 2)):
        method = {"num_patches": num_patches, "warmup_steps": warmup_steps}
        answer = run(ranks, {"pipe": ranks.num_ranks}, model, job, **method)
        assert_same(answer, expected(model, job, **method))
