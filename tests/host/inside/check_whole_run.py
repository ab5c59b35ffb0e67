"""Sampling on the workers as a whole, on real pools: equal to the host's loop, with all that goes on around it."""

import os
import signal

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_easycache as easycache
import latent_preview
import pytest
import torch
from check_loop import apply
from check_lora import TARGETS, with_lora
from check_nodes import Guiders, custom_inputs, stock_custom
from comfy_xdit_nodes import whole_run
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.pool import connect
from comfy_xdit_nodes.samplers import XDiTSamplerCustomAdvanced
from comfy_xdit_nodes.whole_run import Follower

import nodes
from comfy_xdit.messages import Cancel, Peek, Status
from comfy_xdit.pool.client import Pool, PoolError

KINDS = ("sd3", "flux", "pixart")
SAME, STOCK = 1e-6, 1e-4
"""How far a run on the workers may be from step mode, and from stock; of the latent's norm, in fp32."""


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
        found = [r.getMessage() for r in caplog.records if r.name == "comfy_xdit" and " on pool " in r.getMessage()]
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


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler(kind, sampler, loaded, pools, log, record_property):
    stock, ours = loaded(kind)
    inputs = tiny.fitted(kind, {"sampler_name": sampler, **picture()})
    whole = tiny.sample(parallelize(ours, pools(2)), **inputs)
    said = log()
    step = tiny.sample(parallelize(ours, pools(2, sampling="step")), **inputs)
    said += log()
    assert len(said) == 2
    assert "step by step in ComfyUI, since the pool's `sampling` is set to 'step'" in said[1]
    if sampler == "dpm_adaptive":
        assert "since the sampler uses abs on the latent" in said[0]
    else:
        assert "on pool ranks2 (2 ranks, cfg=2): " in said[0] and "as a whole on the workers" in said[0]
    host = tiny.sample(stock, **inputs)
    record_property("distance", [kind, sampler, distance(whole, step), distance(whole, host)])
    assert distance(whole, step) <= SAME
    assert distance(whole, host) <= STOCK


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("heun", "ddim_uniform"),
        ("heunpp2", "normal"),
        ("dpmpp_2m", "kl_optimal"),
        ("res_multistep_cfg_pp", "ddim_uniform"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_schedules_that_magnify_rounding(kind, sampler, scheduler, loaded, pools, record_property):
    """Where a sampler divides by a small sigma, only the host's own operations, in its order, end where it ends."""
    stock, ours = loaded(kind)
    inputs = tiny.fitted(kind, {"sampler_name": sampler, "scheduler": scheduler, **picture()})
    whole = tiny.sample(parallelize(ours, pools(2)), **inputs)
    step = tiny.sample(parallelize(ours, pools(2, sampling="step")), **inputs)
    record_property("distance", [kind, sampler, distance(whole, step), distance(whole, tiny.sample(stock, **inputs))])
    assert distance(whole, step) <= SAME


HALF = torch.ones(1, 1, 30, 20).tril()
SOFT = torch.linspace(0, 1, 20).expand(1, 1, 30, 20).contiguous()
UNEVEN = tiny.conditioning(tokens=9, seed=4)

JOBS = {
    "cfg 1": ({"ulysses": 2}, {"cfg": 1.0}),
    "cfg 1, cfg++": ({}, {"cfg": 1.0, "sampler_name": "euler_cfg_pp"}),
    "prompts of different length": ({}, {"negative": UNEVEN, "sampler_name": "res_multistep_cfg_pp"}),
    "a batch": ({"dp": 2}, {"latent_image": tiny.latent(18, 22, batch=3), "sampler_name": "euler_ancestral"}),
    "inpaint": ({"ring": 2}, {**picture(noise_mask=HALF), "sampler_name": "dpmpp_2m"}),
    "inpaint, soft, sde": ({}, {**picture(noise_mask=SOFT), "sampler_name": "dpmpp_sde"}),
}
"""Degrees, and inputs of the stock node."""


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("kind", KINDS)
def test_jobs(kind, name, loaded, pools, log):
    degrees, inputs = JOBS[name][0], tiny.fitted(kind, JOBS[name][1])
    stock, ours = loaded(kind)
    outputs, states = [], []
    settings = pools(2, sampling="step", **degrees), pools(2, **degrees)
    for model in (stock, *(parallelize(ours, setting) for setting in settings)):
        log()
        outputs.append(tiny.sample(model, **inputs))
        states.append(torch.get_rng_state())
    assert "as a whole on the workers" in log()[0]
    host, step, whole = outputs
    assert distance(whole, step) <= SAME
    assert distance(whole, host) <= STOCK
    assert all(torch.equal(state, states[0]) for state in states), "other nodes draw on from there"


def test_steps_that_leave_noise(loaded, pools, log):
    stock, ours = loaded("sd3")
    inputs = {
        **{"add_noise": "enable", "noise_seed": 3, "steps": 6, "cfg": 2.0, "sampler_name": "dpmpp_2m"},
        **{"scheduler": "beta", "positive": tiny.conditioning(), "negative": tiny.conditioning(seed=11)},
        **{"latent_image": tiny.latent(), "start_at_step": 1, "end_at_step": 4},
        "return_with_leftover_noise": "enable",
    }
    sample = nodes.KSamplerAdvanced().sample
    (host,), (whole,) = (sample(model=model, **inputs) for model in (stock, parallelize(ours, pools(2))))
    assert "3 evaluations" in log()[0]
    assert distance(whole["samples"], host["samples"]) <= STOCK


def test_a_lora(loaded, pools, log):
    stock, ours = loaded("flux")
    host, whole = (
        tiny.sample(with_lora(model, "lora", TARGETS["flux"], 0.7)) for model in (stock, parallelize(ours, pools(2)))
    )
    assert "as a whole" in log()[0]
    assert distance(whole, host) <= STOCK
    assert distance(tiny.sample(stock), host) > STOCK


def shown(model, sampler, steps=4, stop=lambda step: None):
    """What ComfyUI's own callback showed of a run: (step, total, denoised latent)."""
    seen = []

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format, denoised):
            return denoised.clone()

    class Bar:
        def __init__(self, total):
            assert total == steps

        def update_absolute(self, value, total, preview):
            seen.append((value - 1, total, preview))
            stop(value - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_preview, "get_previewer", lambda *args: Previewer())
        patch.setattr(comfy.utils, "ProgressBar", Bar)
        sampled(model, sampler, latent_preview.prepare_callback(model, steps), steps)
    return seen


def sampled(model, sampler, callback, steps=4):
    guider = Guiders().cfg(model)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    given = (noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas)
    return guider.sample(*given, callback=callback, seed=5)


def shrink_x(step, denoised, x, total):
    x.mul_(0.9)


def shrink_denoised(step, denoised, x, total):
    denoised.mul_(0.9)


def wrapped(step, denoised, x, total):
    """With the names of ComfyUI's own, as `functools.wraps` gives them."""
    x.mul_(0.9)


wrapped.__module__, wrapped.__qualname__ = "latent_preview", "prepare_callback.<locals>.callback"


@pytest.mark.parametrize("callback", [shrink_x, shrink_denoised, wrapped])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_callback_that_writes_has_its_effect(sampler, callback, loaded, pools, log):
    stock, ours = loaded("sd3")
    host, step = sampled(stock, sampler, callback), sampled(parallelize(ours, pools(2)), sampler, callback)
    (line,) = log()
    assert "step by step in ComfyUI, since " in line and "is called after every step" in line
    assert distance(step, host) <= STOCK
    changed = distance(sampled(stock, sampler, None), host)
    # Euler has read the denoised latent by then.
    assert changed > 0.01 or (sampler, callback) == ("euler", shrink_denoised)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde", "dpm_fast", "uni_pc", "sa_solver_pece"])
def test_previews_are_those_of_the_host(sampler, loaded, pools, log):
    stock, ours = loaded("flux")
    host, whole = shown(stock, sampler), shown(parallelize(ours, pools(2)), sampler)
    assert "as a whole" in log()[0]
    assert len(host) >= 2
    assert [report[:2] for report in whole] == [report[:2] for report in host]
    assert all(distance(mine[2], theirs[2]) <= STOCK for mine, theirs in zip(whole, host, strict=True))


@pytest.mark.parametrize("guider", ["cfg", "basic", "dual"])
def test_denoised_output(guider, loaded, pools, log):
    stock, _ = loaded("sd3")
    inputs = custom_inputs(getattr(Guiders(), guider)(stock))
    ours = XDiTSamplerCustomAdvanced().sample(pool=pools(2), **inputs)
    assert "as a whole" in log()[0]
    for mine, host in zip(ours, stock_custom(inputs), strict=True):
        assert distance(mine["samples"], host["samples"]) <= STOCK


def regions(positive):
    late = nodes.ConditioningSetTimestepRange().set_range(tiny.conditioning(seed=21), 0.4, 1.0)[0]
    return {"late": late, "two": positive + tiny.conditioning(seed=20)}


@pytest.mark.parametrize(
    ("change", "positive", "reason"),
    [
        ("easy", None, r'a \w+ wrapper \(node "EasyCache\w*"( or "LazyCache\w*")?\) runs between the steps'),
        (None, "two", "the positive conditioning has 2 parts"),
        (None, "late", "the positive conditioning is on in a part of the steps only"),
    ],
)
def test_the_log_says_what_keeps_a_run_in_the_host(change, positive, reason, loaded, pools, log):
    import re

    stock, ours = loaded("flux")
    ours = parallelize(ours, pools(2))
    if change == "easy":
        stock, ours = (
            apply(easycache.EasyCacheNode, "patch", model, 0.05, 0.3, 0.9, False) for model in (stock, ours)
        )
    inputs = {} if positive is None else {"positive": regions(tiny.conditioning())[positive]}
    assert distance(tiny.sample(ours, **inputs), tiny.sample(stock, **inputs)) <= STOCK
    (line,) = log()
    assert re.search(f"euler runs step by step in ComfyUI, since .*{reason}", line)


def test_too_many_steps_to_trace(loaded, pools, log, monkeypatch):
    monkeypatch.setattr(whole_run, "MAX_STEPS", 3)
    model = parallelize(loaded("sd3")[1], pools(2))
    tiny.sample(model, steps=4)
    tiny.sample(model, steps=3)
    many, few = log()
    assert "step by step in ComfyUI, since it has 4 steps, more than the 3" in many
    assert "as a whole" in few


def interrupt(step):
    if step == 2:
        comfy.model_management.interrupt_current_processing()


def fail(step):
    if step == 2:
        raise ZeroDivisionError("a previewer of somebody's")


@pytest.mark.parametrize(
    ("stop", "raised"), [(interrupt, comfy.model_management.InterruptProcessingException), (fail, ZeroDivisionError)]
)
@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"ring": 2}, {"pipe": 2}, {"distri": 2}], ids=str)
def test_an_interrupted_run_ends_on_the_workers(stop, raised, degrees, loaded, pools, monkeypatch):
    setting = pools(2, **degrees)
    model, pool, cancelled = parallelize(loaded("sd3")[1], setting), connect(setting), []
    aside = Pool.aside

    def watched(this, message, **options):
        cancelled.extend([message.job] if isinstance(message, Cancel) else [])
        return aside(this, message, **options)

    monkeypatch.setattr(Pool, "aside", watched)
    expected = shown(model, "euler")
    generation = pool.generation
    with pool.lease():
        with pytest.raises(raised):
            shown(model, "euler", steps=400, stop=stop)
        pool.call(Status())  # In line behind the job.
        (job,) = cancelled
        left = pool.aside(Peek(job=job)).value
        assert not left or left[-1]["step"] < 399
    again = shown(model, "euler")
    assert pool.generation == generation
    assert all(torch.equal(mine[2], before[2]) for mine, before in zip(again, expected, strict=True))


@pytest.mark.parametrize("degrees", [{}, {"pipe": 2}, {"distri": 2}], ids=str)
def test_a_worker_killed_in_mid_run_is_a_sentence_and_the_next_run_works(degrees, loaded, pools):
    setting = pools(2, **degrees)
    model, pool = parallelize(loaded("flux")[1], setting), connect(setting)
    expected = shown(model, "euler")

    def kill(step):
        if step == 2:
            os.kill(pool.status()["ranks"][1]["pid"], signal.SIGKILL)

    with pytest.raises(PoolError, match=r"^[^\n]*run the job again[^\n]*$"):
        shown(model, "euler", steps=400, stop=kill)
    again = shown(model, "euler")
    assert all(distance(mine[2], before[2]) <= SAME for mine, before in zip(again, expected, strict=True))


def test_lost_reports_are_said():
    class Silent:
        def aside(self, message, **options):
            return None

    follower = Follower(Silent(), "job", print)
    follower.poll()
    with pytest.raises(RuntimeError, match="2 of 2 progress reports"):
        follower.finish(2)


def test_cancel_is_heard_while_rank_0_stands_still():
    class Still:
        cancelled = None

        def aside(self, message, *, poll=None, timeout_s=5.0):
            if isinstance(message, Cancel):
                self.cancelled = timeout_s
            else:
                comfy.model_management.interrupt_current_processing()
                poll()

    pool = Still()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Follower(pool, "job", print).poll()
    assert pool.cancelled == 0, "it is told, and not waited for"


def test_a_pipeline_step_by_step_says_what_it_costs(loaded, pools, log):
    """Four rows go through two stages, which takes the time of five."""
    stock, ours = loaded("flux")
    inputs = {"latent_image": tiny.latent(batch=2)}
    model = parallelize(ours, pools(2, pipe=2, sampling="step"))
    assert distance(tiny.sample(model, **inputs), tiny.sample(stock, **inputs)) <= STOCK
    assert "the pipeline of 2 stages runs empty after every evaluation there" in (line := log()[0])
    assert line.endswith("each rank works 80% of the time")


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_sde", "res_multistep_cfg_pp"])
def test_a_pipeline_in_which_every_evaluation_is_exact(sampler, loaded, pools, log):
    stock, ours = loaded("sd3")
    inputs = {"sampler_name": sampler, **picture(noise_mask=SOFT)}
    model = parallelize(ours, pools(2, pipe=2, warmup_steps=1000))
    assert distance(tiny.sample(model, **inputs), tiny.sample(stock, **inputs)) <= STOCK
    assert "(2 ranks, pipe=2)" in (line := log()[0]) and "as a whole" in line
