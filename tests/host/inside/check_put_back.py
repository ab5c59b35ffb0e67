"""A run that turns out to be none for a program leaves no trace: step mode then ends where stock ends."""

import functools
import random

import comfy.model_management
import comfy.samplers
import comfy_xdit_nodes.whole_run
import numpy as np
import pytest
import torch
from check_nodes import Guiders, custom_inputs, stock_custom
from check_trace import arguments, none, start, toy
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.put_back import MAX_OBJECTS
from comfy_xdit_nodes.samplers import XDiTSamplerCustomAdvanced
from comfy_xdit_nodes.trace import NotAProgram
from comfy_xdit_nodes.trajectory import plan, why_step_mode

MODULES = torch.Generator()
STEPS = []


def euler(draw):
    """An ancestral sampler of somebody's, that looks at the latent's numbers in its last step.

    draw(x, i): the noise that is added in step i.
    """

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None, **rest):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **extra_args)
            x = denoised + (x - denoised) * (sigmas[i + 1] / sigmas[i]) + 0.1 * draw(x, i)
        return x / max(1.0, float(x.abs().max()) / 50)

    return function


class Counting:
    def __init__(self):
        self.steps, self.seen = 0, []

    def __call__(self, x, i):
        self.steps += 1
        self.seen.append(x)
        return torch.full_like(x, 0.1 * self.steps)


def in_closure():
    generator = torch.Generator().manual_seed(3)
    return euler(lambda x, i: torch.randn(x.shape, generator=generator))


def in_module():
    MODULES.manual_seed(4)
    return euler(lambda x, i: torch.randn(x.shape, generator=MODULES))


def in_place():
    kept = {"deep": [torch.Generator().manual_seed(5)]}
    return euler(lambda x, i: torch.empty(x.shape).normal_(generator=kept["deep"][0]))


def of_numpy():
    generator = np.random.default_rng(6)
    return euler(lambda x, i: float(generator.standard_normal()))


def numpys_own():
    np.random.seed(7)
    return euler(lambda x, i: float(np.random.standard_normal()))


def pythons_own():
    random.seed(8)
    return euler(lambda x, i: random.random())


def of_python():
    generator = random.Random(9)
    return euler(functools.partial(lambda generator, x, i: generator.random(), generator))


def counted():
    steps = 0

    def draw(x, i):
        nonlocal steps
        steps += 1
        return 0.1 * steps

    return euler(draw)


def in_object():
    return euler(Counting())


SAMPLERS = (in_closure, in_module, in_place, of_numpy, numpys_own, pythons_own, of_python, counted, in_object)


@pytest.mark.parametrize("make", SAMPLERS, ids=lambda make: make.__name__)
def test_after_an_attempt_the_sampler_runs_as_in_stock(make):
    guider = toy.guider("flow")
    sigmas, begin = toy.sigmas(guider, 6), start()
    given = [begin.noise, begin.latent, None]

    def stock(sampler):
        return sampler.sample(guider, sigmas.clone(), arguments(guider), None, *given, True)

    expected = stock(comfy.samplers.KSAMPLER(make()))
    tried = comfy.samplers.KSAMPLER(make())
    with pytest.raises(NotAProgram):
        plan(tried, guider, sigmas, arguments(guider), *given, constants=none)
    assert torch.equal(stock(tried), expected)


def test_a_noise_sampler_among_the_options_is_put_back():
    class Own:
        def __init__(self):
            self.generator, self.drawn = torch.Generator().manual_seed(1), 0

        def __call__(self, sigma, sigma_next):
            self.drawn += 1
            return torch.randn(2, 4, 6, 5, generator=self.generator) * self.drawn

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        return euler(lambda x, i: noise_sampler(sigmas[i], sigmas[i + 1]))(model, x, sigmas, extra_args)

    guider = toy.guider("flow")
    sigmas, begin = toy.sigmas(guider, 6), start()
    given = [begin.noise, begin.latent, None]
    expected = comfy.samplers.KSAMPLER(function, {"noise_sampler": Own()}).sample(
        guider, sigmas, arguments(guider), None, *given, True
    )
    tried = comfy.samplers.KSAMPLER(function, {"noise_sampler": Own()})
    with pytest.raises(NotAProgram):
        plan(tried, guider, sigmas, arguments(guider), *given, constants=none)
    assert torch.equal(tried.sample(guider, sigmas, arguments(guider), None, *given, True), expected)


@pytest.mark.parametrize("make", [in_closure, in_module, in_object], ids=lambda make: make.__name__)
def test_step_mode_after_an_attempt_ends_as_stock(make, models, fake, monkeypatch, caplog):
    caplog.set_level("INFO", "comfy_xdit")
    monkeypatch.setattr(comfy_xdit_nodes.whole_run, "why_step_mode", why_step_mode)
    path = models / "sd3.safetensors"
    stock, ours = tiny.load(path), parallelize(from_checkpoint(open_checkpoint(str(path))))
    expected = stock_custom(custom_inputs(Guiders().cfg(stock)) | {"sampler": comfy.samplers.KSAMPLER(make())})
    inputs = custom_inputs(Guiders().cfg(ours)) | {"sampler": comfy.samplers.KSAMPLER(make())}
    found = XDiTSamplerCustomAdvanced().sample(**inputs)
    assert "looks at the latent's numbers" in caplog.text or "abs on the latent" in caplog.text
    assert torch.equal(found[0]["samples"], expected[0]["samples"])


def test_a_sampler_that_reaches_too_much_is_not_tried():
    drawn, kept = [], [[] for _ in range(MAX_OBJECTS)]

    def draw(x, i):
        drawn.append(len(kept))
        return 0.0

    guider, begin = toy.guider("flow"), start()
    given = [begin.noise, begin.latent, None]
    sampler = comfy.samplers.KSAMPLER(euler(draw))
    with pytest.raises(NotAProgram, match="more than 10000 objects"):
        plan(sampler, guider, toy.sigmas(guider, 6), arguments(guider), *given, constants=none)
    assert not drawn


def test_an_interruption_is_heard_while_a_run_is_recorded():
    """The user's cancel comes in the third of 300 steps; the generators are then where they were."""
    private = torch.Generator().manual_seed(1)
    STEPS.clear()

    def draw(x, i):
        STEPS.append(i)
        if i == 2:
            comfy.model_management.interrupt_current_processing()
        return torch.randn(x.shape, generator=private)

    guider, begin = toy.guider("flow"), start()
    before, own = torch.get_rng_state(), private.get_state()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        plan(
            comfy.samplers.KSAMPLER(euler(draw)),
            guider,
            toy.sigmas(guider, 300),
            arguments(guider),
            begin.noise,
            begin.latent,
            constants=none,
        )
    assert STEPS == [0, 1, 2]
    assert torch.equal(private.get_state(), own) and torch.equal(torch.get_rng_state(), before)
