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
    "distri=2, all exact": (2, {"distri": 2, "warmup_steps": 10_000}),
}
LIMIT = 1e-5
"""Of N ranks; one rank is equal to the bit."""


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(*shape, seed, **more):
    return [[random(*shape, seed=seed), more]]


class Case:
    """A tiny model, and what its workflow gives it. shape: of the latent."""

    def __init__(self, config, shape, channels, **more):
        self.config, self.shape, self.channels, self.more = config, shape, channels, more

    def run(self, model, cfg=3.0, sampler="euler"):
        positive, negative = (text(1, n, self.channels, seed=n, **self.more) for n in (9, 9))
        latent = torch.zeros(self.shape)
        noise = random(*self.shape)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 3, cfg, sampler, "simple", positive, negative, latent, disable_pbar=True, seed=1
            )


CASES = {
    "wan": Case(make.wan, (2, 16, 3, 10, 12), 4096),
    "qwen": Case(make.qwen, (1, 16, 1, 10, 12), 3584),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """`stock(name)`: the MODEL of a case, and its latent as ComfyUI makes it."""
    made = {}

    def get(name):
        if name not in made:
            case = CASES[name]
            path = tmp_path_factory.mktemp(name) / f"{name}.safetensors"
            model = comfy.sd.load_diffusion_model(str(make.save(path, make.weights(case.config(), torch.float32))))
            made[name] = model, case.run(model)
        return made[name]

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name, mode, stock, pools):
    model, expected = stock(name)
    num_ranks, degrees = MODES[mode]
    ours = CASES[name].run(parallelize(model, pools(num_ranks, **degrees)))
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    log.info("%s %s: %.1e", name, mode, error)
    assert expected.isfinite().all() and expected.std() > 0
    assert error == 0 if num_ranks == 1 else error <= LIMIT
