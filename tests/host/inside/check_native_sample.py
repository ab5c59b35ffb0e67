"""Whole workflows on ComfyUI's own classes: stock loader, our node, a sampler; equal to ComfyUI's own run."""

import logging

import comfy.sample
import comfy.sd
import native_models as make
import pytest
import torch
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

MODES = {
    "1 rank": (1, {}),
    "ulysses=2": (2, {"ulysses": 2}),
    "ring=3": (3, {"ring": 3}),
    "cfg=2": (2, {"cfg": 2}),
    "dp=2": (2, {"dp": 2}),
    "pipe=2, all exact": (2, {"pipe": 2, "warmup_steps": 10_000}),
    "pipe=2, step by step": (2, {"pipe": 2, "sampling": "step"}),
    "distri=2, all exact": (2, {"distri": 2, "warmup_steps": 10_000}),
}
LIMIT = {False: 1e-5, True: 1e-4}
"""Of N ranks, by whether activations are quantised: then the last bit of a sum may make a step of a whole number more.
One rank is equal to the bit."""


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(*shape, seed, **more):
    return [[random(*shape, seed=seed), more]]


class Case:
    """A tiny model, and what its workflow gives it. weights: of its file; shape: of the latent."""

    def __init__(self, weights, shape, channels, **more):
        self.weights, self.shape, self.channels, self.more = weights, shape, channels, more

    def run(self, model, cfg=3.0, sampler="euler", steps=3, callback=None):
        positive, negative = (text(1, n, self.channels, seed=n, **self.more) for n in (9, 9))
        latent = torch.zeros(self.shape)
        noise = random(*self.shape)
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                noise,
                steps,
                cfg,
                sampler,
                "simple",
                positive,
                negative,
                latent,
                callback=callback,
                disable_pbar=True,
                seed=1,
            )


def plain(config):
    return make.weights(config, torch.float32)


def i2v():
    """Of Wan 2.1: a frame is given, as further channels."""
    return plain(make.wan("WAN21_I2V", model_type="i2v", in_dim=36))


CASES = {
    "wan": Case(lambda: plain(make.wan()), (2, 16, 3, 10, 12), 4096),
    "wan i2v": Case(
        i2v,
        (1, 16, 3, 10, 12),
        4096,
        concat_latent_image=random(1, 16, 3, 10, 12, seed=5),
        concat_mask=(random(1, 1, 3, 10, 12, seed=6) > 0).float(),
    ),
    "qwen": Case(lambda: plain(make.qwen()), (1, 16, 1, 10, 12), 3584),
    "qwen int8": Case(lambda: make.quantised(make.weights(make.qwen()), ["int8_tensorwise"]), (1, 16, 1, 10, 12), 3584),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """`stock(name)`: the MODEL of a case, and its latent as ComfyUI makes it."""
    return make.loaded_once(CASES, tmp_path_factory)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name, mode, stock, pools):
    model, expected = stock(name)
    num_ranks, degrees = MODES[mode]
    ours = CASES[name].run(parallelize(model, pools(num_ranks, **degrees)))
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    log.info("%s %s: %.1e", name, mode, error)
    assert expected.isfinite().all() and expected.std() > 0
    assert error == 0 if num_ranks == 1 else error <= LIMIT["int8" in name]


def test_a_plan_that_does_not_hold_here_is_refused(stock, pools, monkeypatch):
    """What an earlier self-test found; on one rank nothing is cut, and nothing refused."""
    from comfy_xdit_nodes.native import proven

    model, expected = stock("wan")
    monkeypatch.setattr(proven, "why_refused", lambda family, *where: f"{family.title} is refused")
    proven._require.cache_clear()
    with pytest.raises(ValueError, match="Wan is refused"):
        CASES["wan"].run(parallelize(model, pools(2, ulysses=2)))
    assert torch.equal(CASES["wan"].run(parallelize(model, pools(1))), expected)
