"""A workflow of two models, as Wan 2.2's: one for the high noise, one for the low; both stay on the workers."""

import logging

import comfy.sample
import comfy.sd
import native_models as make
import pytest
import torch
from check_native_sample import CASES, random, text
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.pool import connect

from comfy_xdit.messages import Status

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

CASE = CASES["wan"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The MODELs for the high and for the low noise, of the same shapes."""
    folder = tmp_path_factory.mktemp("two")
    weights = {name: make.weights(make.wan(), torch.float32, seed=seed) for name, seed in (("high", 3), ("low", 4))}
    return [
        comfy.sd.load_diffusion_model(str(make.save(folder / f"{name}.safetensors", weights[name])))
        for name in weights
    ]


def sample(high, low):
    """Four steps, two by each model, the noise that is left handed on."""
    positive, negative = (text(1, 9, CASE.channels, seed=seed) for seed in (1, 2))
    noise, latent = random(*CASE.shape), torch.zeros(CASE.shape)
    common = {"disable_pbar": True, "seed": 1}
    given = 4, 3.0, "euler", "simple", positive, negative
    half = comfy.sample.sample(high, noise, *given, latent, start_step=0, last_step=2, **common)
    rest = torch.zeros_like(half)
    last = {"disable_noise": True, "start_step": 2, "last_step": 10_000, "force_full_denoise": True}
    return comfy.sample.sample(low, rest, *given, half, **last, **common)


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"pipe": 2, "warmup_steps": 10_000}], ids=str)
def test_both_stay_warm_and_give_stocks_latent(degrees, models, pools):
    expected = sample(*models)
    setting = pools(2, **degrees)
    ours = [parallelize(model, setting) for model in models]
    latents = [sample(*ours) for _ in range(2)]
    error = max((latent - expected).abs().max().item() for latent in latents) / expected.abs().max().item()
    log.info("two models, %s: %.1e", degrees, error)
    assert error <= 1e-5 and not torch.equal(expected, sample(models[0], models[0]))
    pool = connect(setting)
    with pool.lease():
        assert all(len(answer.value["models"]) >= 2 for answer in pool.call_all(Status()))
