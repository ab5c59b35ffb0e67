"""Faults while a model of ComfyUI's own class runs: a sentence each, and the next run on the workers is right."""

import os
import signal

import comfy.model_management
import comfy.sample
import comfy.sd
import native_models as make
import pytest
import torch
from check_native_sample import CASES, LIMIT
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.pool import connect

from comfy_xdit.messages import Status
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.stop import stop

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

CASE = CASES["wan"]
NEAR = 0.2
"""How far from stock a run with old keys may be."""

MODES = [{"ulysses": 2}, {"pipe": 2}, {"ulysses": 2, "sampling": "step"}]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """ComfyUI's MODEL, and its latent."""
    path = make.save(tmp_path_factory.mktemp("wan") / "wan.safetensors", CASE.weights())
    model = comfy.sd.load_diffusion_model(str(path))
    return model, CASE.run(model)


@pytest.fixture(params=MODES, ids=str)
def ours(request, stock, pools):
    """The MODEL on a pool, its setting, and whether a run of it is right: near stock's, and what it was at first."""
    model, expected = stock
    setting = pools(2, **request.param)
    on_pool = parallelize(model, setting)
    first = CASE.run(on_pool)

    def is_right():
        return torch.equal(CASE.run(on_pool), first)

    limit = NEAR if "pipe" in request.param else LIMIT[False]
    assert (first - expected).abs().max() <= limit * expected.abs().max() and is_right()
    return on_pool, setting, is_right


def test_a_worker_that_is_killed(ours):
    model, setting, is_right = ours

    def kill(step, *rest):
        if step == 2:
            os.kill(connect(setting).status()["ranks"][1]["pid"], signal.SIGKILL)

    with pytest.raises(PoolError, match=r"^[^\n]*run the job again[^\n]*$"):
        CASE.run(model, steps=200, callback=kill)
    assert is_right()


def test_an_interruption(ours):
    model, setting, is_right = ours
    generation = connect(setting).generation

    def interrupt(step, *rest):
        comfy.model_management.interrupt_current_processing(step == 2)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        CASE.run(model, steps=200, callback=interrupt)
    assert is_right() and connect(setting).generation == generation


def test_a_pool_that_was_stopped(ours):
    _, setting, is_right = ours
    stop(setting.name)
    assert is_right()


def test_unloading_frees_the_workers(ours):
    _, setting, is_right = ours
    comfy.model_management.unload_all_models()
    pool = connect(setting)
    with pool.lease():
        # Asked themselves: the pool's status is as old as their last beat.
        assert not any(answer.value["models"] for answer in pool.call_all(Status()))
    assert is_right()


def test_what_does_not_fit_is_told_before_a_worker_is_touched(ours):
    model, setting, is_right = ours
    generation = connect(setting).generation
    texts = [[torch.zeros(1, 9, CASE.channels), {}]]
    flat = torch.zeros(1, 16, 10, 12)
    with pytest.raises(ValueError, match=r"\[1, 16, 10, 12\] can't be sampled with Wan, whose latents have 5 dims"):
        comfy.sample.sample(model, flat, 3, 1.0, "euler", "simple", texts, texts, flat, disable_pbar=True, seed=1)
    assert is_right() and connect(setting).generation == generation


@pytest.mark.parametrize("channels", [48, 4100])
def test_text_of_another_model_is_a_sentence(channels, ours):
    model, setting, is_right = ours
    generation = connect(setting).generation
    texts, latent = [[torch.zeros(1, 9, channels), {}]], torch.zeros(CASE.shape)
    with pytest.raises(PoolError, match=r"^Wan can't take what it is given \([^\n]+\); use the text encoders"):
        comfy.sample.sample(model, latent, 3, 1.0, "euler", "simple", texts, texts, latent, disable_pbar=True, seed=1)
    # All ranks saw it before their first message, but for a stage after the first.
    assert is_right() and ("pipe" in str(setting.requested) or connect(setting).generation == generation)
