"""Sampling on the workers as a whole, on real pools: equal to the host's loop, with all that goes on around it."""

import comfy.samplers
import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize

KINDS = ("sd3", "flux")
SAME, STOCK = 1e-6, 1e-4
"""How far a run on the workers may be from step mode, and from stock; of the latent's norm, in fp32."""

SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS
SAMPLERS = {name: SCHEDULERS[i % len(SCHEDULERS)] for i, name in enumerate(comfy.samplers.KSampler.SAMPLERS)}


@pytest.fixture(scope="module")
def loaded(models):
    """`loaded(kind)`: stock's MODEL and ours, kept for the module."""
    kept = {}

    def pair(kind):
        if kind not in kept:
            path = models / f"{kind}.safetensors"
            kept[kind] = tiny.load(path), from_checkpoint(open_checkpoint(str(path)))
        return kept[kind]

    return pair


@pytest.fixture
def log(caplog):
    """The log's line on each run since the last look."""
    caplog.set_level("INFO", "comfy_xdit")

    def lines():
        found = [r.getMessage() for r in caplog.records if r.name == "comfy_xdit" and " runs " in r.getMessage()]
        caplog.clear()
        return found

    return lines


def distance(ours, host):
    return float((ours - host).norm() / host.norm())


def picture(**changes):
    """A latent with something in it: 15 by 10 patches, so that no degree divides the tokens."""
    latent = tiny.latent(30, 20)
    latent["samples"] = latent["samples"] + torch.linspace(-1, 1, 20)
    return {"latent_image": latent | changes, "denoise": 0.9}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler(kind, sampler, loaded, pools, log):
    stock, ours = loaded(kind)
    inputs = {"sampler_name": sampler, "scheduler": SAMPLERS[sampler], **picture()}
    whole = tiny.sample(parallelize(ours, pools(2)), **inputs)
    said = log()
    step = tiny.sample(parallelize(ours, pools(2, sampling="step")), **inputs)
    said += log()
    assert len(said) == 2
    assert "step by step in ComfyUI, since the pool's `sampling` is set to 'step'" in said[1]
    if sampler == "dpm_adaptive":
        assert "since the sampler takes other steps when the numbers are others" in said[0]
    else:
        assert "on pool ranks2 (2 ranks, cfg=2): " in said[0] and "as a whole on the workers" in said[0]
    host = tiny.sample(stock, **inputs)
    print("DISTANCE", kind, sampler, SAMPLERS[sampler], distance(whole, step), distance(whole, host), said[0])
    assert distance(whole, step) <= SAME
    assert distance(whole, host) <= STOCK
