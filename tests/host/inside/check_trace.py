"""Every sampler of the host, traced and replayed, ends where the host's own loop ends."""

import copy
import dataclasses
import threading
from pathlib import Path

import comfy.k_diffusion.sampling as k_sampling
import comfy.samplers
import pytest
import torch
from _pytest.pathlib import import_path
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.constant_call import Catcher
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint
from comfy_xdit_nodes.trace import NotAProgram
from comfy_xdit_nodes.trajectory import plan, why_step_mode

from comfy_xdit import messages
from comfy_xdit.trajectory import Replay

HERE = Path(__file__).parent
toy = import_path(HERE / "toy.py", root=HERE, mode="importlib", consider_namespace_packages=False)

PROGRAMS = [name for name in comfy.samplers.SAMPLER_NAMES if name != "dpm_adaptive"]
FUSED, ROUNDING = ("sample_seeds_2",), 3e-7
"""Samplers with torch's lerp, whose operations the program has one by one; and how far they may be off, of the norm."""

PEAK = {"euler": 2, "ddim": 2, "euler_ancestral": 2, "heun": 4, "dpmpp_2m": 3, "dpmpp_2m_sde": 3, "lcm": 2}
"""Latents held while the network runs, at most: the sampler's state, what it remembers, the network's scaled input."""


@dataclasses.dataclass
class Start:
    noise: torch.Tensor
    latent: torch.Tensor
    mask: torch.Tensor | None


def start(*, masked=False, seed=5):
    """What the stock node has when it calls the sampler: the global generator stands behind the noise."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 6, 5, generator=generator) * 0.3
    mask = torch.rand(2, 1, 6, 5, generator=generator).expand(2, 4, 6, 5) if masked else None
    return Start(torch.randn(latent.shape, generator=torch.manual_seed(seed)), latent, mask)


def arguments(guider, seed=5):
    options = copy.deepcopy(guider.model_options["transformer_options"])
    return {"model_options": {**guider.model_options, "transformer_options": options}, "seed": seed}


def stock(guider, sampler, sigmas, begin):
    """Samples, previews and the generator's state after the host's own loop."""
    shown = []

    def callback(step, denoised, x, total):
        shown.append((step, total, denoised.clone()))

    given = [begin.noise.clone(), begin.latent.clone(), begin.mask]
    samples = sampler.sample(guider, sigmas.clone(), arguments(guider), callback, *given, True)
    return samples, shown, torch.get_rng_state()


def none(*args):
    """The toy model is not on a pool, where the network's arguments could be caught."""
    return []


def replayed(guider, job):
    run = Replay(job.program, noise=job.noise, latent=job.latent, noises=job.noises, mask=job.mask)
    shown, peak = [], 0
    for i in range(len(job.program.calls)):
        outputs = toy.evaluate(guider, job.program, i, run.model_input(i))
        peak = max(peak, run.num_held)
        run.answer(i, outputs)
        shown += run.previews(i)
    assert peak == job.program.peak_held()
    return run.output(), shown


def distance(ours, host):
    return float((ours - host).norm() / host.norm())


def compare(guider, sampler, *, steps=8, masked=False, scheduler=None):
    """The job, having checked that it ends as the host's loop does."""
    sigmas = toy.sigmas(guider, steps, scheduler)
    begin = start(masked=masked)
    samples, previews, state = stock(guider, sampler, sigmas, begin)
    evaluations = guider.inner_model.diffusion_model.calls
    begin = start(masked=masked)
    given = (begin.noise, begin.latent, begin.mask)
    assert why_step_mode(guider, sampler, sigmas, *given) is None
    job = plan(sampler, guider, sigmas, arguments(guider), *given, constants=none)
    assert guider.inner_model.diffusion_model.calls == evaluations
    assert torch.equal(torch.get_rng_state(), state)
    job = dataclasses.replace(job, program=messages.decode(*messages.encode(job.program)))
    ours, shown = replayed(guider, job)
    limit = ROUNDING if getattr(sampler.sampler_function, "__name__", "") in FUSED else 0.0
    assert distance(ours, samples) <= limit
    assert [(p.step, p.total) for p in shown] == [preview[:2] for preview in previews]
    assert all(distance(p.denoised, preview[2]) <= limit for p, preview in zip(shown, previews, strict=True))
    return job


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "inpaint"])
@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_sampler(name, kind, masked):
    job = compare(toy.guider(kind), comfy.samplers.sampler_object(name), masked=masked)
    assert job.program.conds == ["positive", "negative"]
    assert job.program.peak_held() <= PEAK.get(name, 8) + 2 * masked
    assert [noise is not None for noise in job.noises] == [j in job.program.noises() for j in range(len(job.noises))]


@pytest.mark.parametrize("kind", ["flux", "v", "edm"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "lms", "res_multistep_cfg_pp"])
def test_other_predictions(name, kind):
    compare(toy.guider(kind), comfy.samplers.sampler_object(name), steps=20)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "deis", "sa_solver_pece", "er_sde"])
def test_few_steps(name, steps):
    compare(toy.guider("flow"), comfy.samplers.sampler_object(name), steps=steps)


def options(name, **extra):
    return pytest.param(lambda: comfy.samplers.ksampler(name, extra), id=f"{name}-{'-'.join(extra)}")


@pytest.mark.parametrize(
    "make",
    [
        options("euler", s_churn=3.0, s_noise=1.01),
        options("heun", s_churn=2.0),
        options("euler_ancestral", eta=0.4, s_noise=0.9),
        options("dpmpp_2s_ancestral", eta=0.5),
        options("dpmpp_sde", eta=0.7, r=0.4),
        options("dpmpp_2m_sde", solver_type="heun", eta=0.0),
        options("dpmpp_3m_sde", s_noise=0.5),
        options("lms", order=3),
        options("deis", max_order=4),
        options("ipndm_v", max_order=2),
        options("sa_solver", use_pece=True, predictor_order=2),
        options("er_sde", max_stage=2, noise_scaler=lambda x: x**2.0),
        options("seeds_2", r=0.3),
        options("gradient_estimation", ge_gamma=1.5),
    ],
)
@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_options(make, kind):
    compare(toy.guider(kind), make())


def test_a_noise_sampler_of_ones_own():
    class Own:
        drawn = 0

        def __call__(self, sigma, sigma_next):
            self.drawn += 1
            return torch.randn(2, 4, 6, 5) * float(sigma_next) + self.drawn

    def sampler():
        return comfy.samplers.ksampler("euler_ancestral", {"noise_sampler": Own()})

    guider = toy.guider("flow")
    sigmas = toy.sigmas(guider, 6)
    samples, _, state = stock(guider, sampler(), sigmas, start())
    begin, ours = start(), sampler()
    job = plan(ours, guider, sigmas, arguments(guider), begin.noise, begin.latent, constants=none)
    assert distance(replayed(guider, job)[0], samples) == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.extra_options["noise_sampler"].drawn == 5


def test_cfg_at_one():
    job = compare(toy.guider("flow", cfg=1.0), comfy.samplers.sampler_object("euler"))
    assert job.program.conds == ["positive"]
    job = compare(toy.guider("flow", cfg=1.0), comfy.samplers.sampler_object("euler_cfg_pp"))
    assert job.program.conds == ["positive", "negative"]
    disabled = toy.guider("flow", cfg=1.0, disable_cfg1_optimization=True)
    assert compare(disabled, comfy.samplers.sampler_object("euler")).program.conds == ["positive", "negative"]


def test_basic_guider():
    guider = toy.guider("flow", cls=custom.Guider_Basic, cfg=1.0, conds=("positive",))
    for name in ("euler", "res_multistep_cfg_pp"):
        assert compare(guider, comfy.samplers.sampler_object(name)).program.conds == ["positive"]


@pytest.mark.parametrize("nested", [False, True])
def test_dual_cfg(nested):
    guider = toy.guider("eps", cls=custom.Guider_DualCFG, conds=("positive", "middle", "negative"))
    guider.set_cfg(2.5, 3.5, nested=nested) if hasattr(guider, "nested") or nested else guider.set_cfg(2.5, 3.5)
    if not hasattr(guider, "nested"):
        guider.nested = False
    job = compare(guider, comfy.samplers.sampler_object("dpmpp_2m"))
    assert set(job.program.conds) == {"positive", "middle", "negative"}


def traced(guider, sampler, *, masked=False):
    begin, sigmas = start(masked=masked), toy.sigmas(guider, 6)
    given = (begin.noise, begin.latent, begin.mask)
    return plan(sampler, guider, sigmas, arguments(guider), *given, constants=none).program


def looking(change):
    """An euler sampler that does something with the values."""

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **extra_args)
            x = change(x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i]), denoised)
        return x

    return comfy.samplers.KSAMPLER(function)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, d: x / x.std(),
        lambda x, d: x - d.mean(),
        lambda x, d: x if x.abs().max() > 1.0 else x * 0.5,
        lambda x, d: x + 0.01 * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x, d: torch.nn.functional.avg_pool2d(x, 3, 1, 1),
        lambda x, d: x.flip(-1),
        lambda x, d: x + torch.from_numpy(d.numpy()),
    ],
    ids=["std", "mean", "branch", "bernoulli", "blur", "flip", "numpy"],
)
def test_a_sampler_that_looks_at_values_is_found(change):
    state = start() and torch.get_rng_state()
    with pytest.raises(NotAProgram):
        traced(toy.guider("flow"), looking(change))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change",
    [lambda x, d: x.clamp(-1, 1), lambda x, d: x * d * 0.3, lambda x, d: x + 0.01, lambda x, d: x.mul_(0.9).sub_(d)],
    ids=["clamp", "product", "offset", "in place"],
)
def test_a_sampler_that_is_elementwise_need_not_be_linear(change):
    compare(toy.guider("flow"), looking(change))


def test_adaptive_steps_are_found():
    for kind in ("flow", "eps"):
        with pytest.raises(NotAProgram, match="abs on the latent"):
            traced(toy.guider(kind), comfy.samplers.sampler_object("dpm_adaptive"))


def test_guiders_that_go_their_own_way_are_found():
    class Nonlinear(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            made = super().predict_noise(*args, **kwargs)
            return made / made.norm()

    class Direct(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return self.inner_model.apply_model(x, timestep)

    class Made(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            self.conds = {name: list(entries) for name, entries in self.conds.items()}
            made = [list(self.conds["positive"]), None]
            return comfy.samplers.calc_cond_batch(self.inner_model, made, x, timestep, model_options)[0]

    reasons = {Nonlinear: "on the latent", Direct: "apply_model", Made: "conditioning of its own"}
    for cls, reason in reasons.items():
        guider = toy.guider("flow", cls=cls)
        with pytest.raises(NotAProgram, match=reason):
            traced(guider, comfy.samplers.sampler_object("euler"))
        assert guider.inner_model.diffusion_model.calls == 0


def test_a_guider_may_evaluate_more_than_once_and_remember():
    """Each evaluation is a call of its own, at the place that the guider chose."""

    class Twice(comfy.samplers.CFGGuider):
        before = None

        def predict_noise(self, x, *args, **kwargs):
            first = super().predict_noise(x, *args, **kwargs)
            made = 0.5 * (first + super().predict_noise(x * 0.9 + 0.1 * first, *args, **kwargs))
            self.before, old = made, made if self.before is None else self.before
            return 0.8 * made + 0.2 * old

    def guider():
        return toy.guider("flow", cls=Twice)

    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    sigmas, begin = toy.sigmas(guider(), 5), start()
    samples, _, _ = stock(guider(), sampler, sigmas, begin)
    begin, ours = start(), guider()
    job = plan(sampler, ours, sigmas, arguments(ours), begin.noise, begin.latent, constants=none)
    assert len(job.program.calls) == 10
    assert distance(replayed(ours, job)[0], samples) == 0.0


def test_the_weight_of_conditioning():
    guider = toy.guider("flow")
    guider.conds["negative"][0]["strength"] = 0.7
    compare(guider, comfy.samplers.sampler_object("euler"))


def test_tapping_ends_with_the_run_and_stays_in_its_thread():
    tree = k_sampling.BatchedBrownianTree
    before = (tree.__init__, tree.__call__)
    x, ends = torch.zeros(1, 4, 4, 4), (torch.tensor(0.1), torch.tensor(10.0))

    def draw():
        return k_sampling.BrownianTreeNoiseSampler(x, *ends, seed=3, cpu=True)(*map(torch.tensor, (5.0, 2.0)))

    expected, elsewhere = draw(), []

    def nosy(x, d):
        thread = threading.Thread(target=lambda: elsewhere.append(draw()))
        thread.start()
        thread.join()
        return x

    traced(toy.guider("flow"), looking(nosy))
    assert elsewhere and all(torch.equal(drawn, expected) for drawn in elsewhere)
    with pytest.raises(NotAProgram):
        traced(toy.guider("flow"), looking(lambda x, d: 1 / 0))
    assert (tree.__init__, tree.__call__) == before
    assert torch.equal(draw(), expected)


def function(*args, **kwargs):
    raise AssertionError("only its name is read")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("sampler_cfg_function", "a CFG function"),
        ("sampler_post_cfg_function", "a post-CFG function"),
        ("sampler_pre_cfg_function", "a pre-CFG function"),
        ("sampler_calc_cond_batch_function", "in place of ComfyUI's evaluation"),
        ("model_function_wrapper", "a wrapper around the model function"),
        ("denoise_mask_function", "mask that changes"),
        ("context_handler", "context windows"),
    ],
)
def test_options_that_need_the_host_loop(option, reason):
    value = [function] if option.endswith(("post_cfg_function", "pre_cfg_function")) else function
    assert reason in (why(toy.guider("flow", **{option: value})) or "")
    assert "check_trace.function" in why(toy.guider("flow", **{option: value}))


def why(guider, sampler=None, mask=None):
    begin = start()
    sampler = sampler or comfy.samplers.sampler_object("euler")
    return why_step_mode(guider, sampler, toy.sigmas(guider, 4), begin.noise, begin.latent, mask)


@pytest.mark.parametrize(
    "kind", ["SAMPLER_SAMPLE", "PREDICT_NOISE", "CALC_COND_BATCH", "APPLY_MODEL", "DIFFUSION_MODEL"]
)
def test_wrappers_that_need_the_host_loop(kind):
    kind = getattr(WrappersMP, kind)
    theirs = {"wrappers": {kind: {"easycache": [function]}}}
    reason = why(toy.guider("flow", transformer_options=theirs))
    assert f"a {kind} wrapper (" in reason and "check_trace.function)" in reason
    ours = {"wrappers": {kind: {"comfy_xdit": [function]}, WrappersMP.OUTER_SAMPLE: {"other": [function]}}}
    assert why(toy.guider("flow", transformer_options=ours)) is None


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"area": (4, 4, 0, 0)}, "an area"),
        ({"mask": torch.ones(1, 6, 5)}, "a mask"),
        ({"hooks": function}, "hooks"),
        ({"control": function}, "a ControlNet"),
        ({"gligen": function}, "GLIGEN"),
        ({"timestep_start": 0.5}, "a part of the steps"),
        ({"timestep_end": 0.6}, "a part of the steps"),
    ],
)
def test_conditioning_that_needs_the_host_loop(part, reason):
    guider = toy.guider("flow")
    guider.conds["negative"][0].update(part)
    assert reason in why(guider) and "negative" in why(guider)
    always = toy.guider("flow")
    always.conds["negative"][0].update({"timestep_start": 1.0, "timestep_end": 0.0, "strength": 0.5})
    assert why(always) is None


def test_more_that_needs_the_host_loop():
    guider = toy.guider("flow")
    guider.conds["positive"].append(toy.cond(0.1))
    assert "2 parts" in why(guider)
    guider = toy.guider("flow")
    guider.model_patcher.callbacks = {"on_prepare_state": {"theirs": [function]}}
    assert "before every step" in why(guider)
    guider = toy.guider("flow")
    guider.inner_model.__class__ = type("Timed", (toy.Model,), {"process_timestep": function})
    assert why(guider) is None
    assert "into timesteps" in why(guider, mask=torch.ones(2, 4, 6, 5))
    guider.inner_model.__class__ = type("Own", (toy.Model,), {"_apply_model": function})
    assert "in its own way" in why(guider)

    class Other(comfy.samplers.KSAMPLER):
        def sample(self, *args, **kwargs):
            return super().sample(*args, **kwargs)

    other = Other(comfy.samplers.sampler_object("euler").sampler_function)
    assert why(toy.guider("flow"), other) is None
    assert "masks in its own way" in why(toy.guider("flow"), other, mask=torch.ones(2, 4, 6, 5))


def trajectory(seen):
    """A SAMPLER_SAMPLE wrapper: the whole loop by a replay, its evaluations from the pool."""

    def wrapper(executor, guider, sigmas, extra_args, callback, noise, latent, mask=None, *rest, **kwargs):
        given = (noise, latent, mask)
        assert why_step_mode(guider, executor.class_obj, sigmas, *given) is None
        job = plan(executor.class_obj, guider, sigmas, extra_args, *given)
        run = Replay(job.program, noise=job.noise, latent=job.latent, noises=job.noises, mask=job.mask)
        for i, call in enumerate(job.program.calls):
            x = run.model_input(i)
            timestep = torch.full((x.shape[0],), call.timestep)
            moving = {"x": x, "timestep": timestep}
            outputs = [guider.inner_model.remote.run.evaluate(job.conds[k] | moving, 1) for k in call.conds]
            run.answer(i, outputs)
            for preview in run.previews(i):
                callback(preview.step, preview.denoised, preview.denoised, preview.total)
        seen.append(job)
        return run.output()

    return wrapper


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler_name": "dpmpp_2m_sde", "cfg": 1.0},
        {"sampler_name": "euler_ancestral", "denoise": 0.6, "latent_image": tiny.latent(18, 22, batch=2)},
        {"sampler_name": "res_multistep_cfg_pp", "negative": tiny.conditioning(tokens=9, seed=4)},
        {"latent_image": {**tiny.latent(), "noise_mask": torch.ones(1, 1, 16, 8).repeat(1, 1, 1, 2).tril()}},
    ],
    ids=["euler", "sde", "image", "uneven-cfg-pp", "inpaint"],
)
def test_real_models_through_the_stock_node(kind, changes, models, fake):
    path = models / f"{kind}.safetensors"
    stock = tiny.sample(tiny.load(path), **changes)
    ours, seen = from_checkpoint(open_checkpoint(str(path))), []
    ours.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "comfy_xdit", trajectory(seen))
    assert distance(tiny.sample(ours, **changes), stock) < 1e-5
    assert len(seen) == 1
    assert fake.log.count("Denoise") == sum(len(call.conds) for call in seen[0].program.calls)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda call: call | {"y": call["y"] * call["timestep"][0]}, "change with the step"),
        (lambda call: call | {"x": call["x"] * 2.0}, "does not know"),
        (lambda call: call | {"timestep": call["timestep"] + 1.0}, "does not know"),
    ],
)
def test_a_host_that_prepares_its_calls_otherwise_is_found(change, reason, models, fake, monkeypatch):
    found = []

    def wrapper(executor, guider, sigmas, extra_args, callback, noise, latent, *rest, **kwargs):
        with pytest.raises(NotAProgram, match=reason):
            plan(executor.class_obj, guider, sigmas, extra_args, noise, latent)
        found.append(torch.get_rng_state())
        return noise

    catch = Catcher.evaluate
    monkeypatch.setattr(Catcher, "evaluate", lambda this, call, chunks: catch(this, change(call), chunks))
    ours = from_checkpoint(open_checkpoint(str(models / "sd3.safetensors")))
    ours.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "comfy_xdit", wrapper)
    tiny.sample(ours, sampler_name="dpmpp_2m_sde")
    expected = torch.Generator().manual_seed(7)
    torch.randn(1, 16, 16, 16, generator=expected)
    assert torch.equal(found[0], expected.get_state())
