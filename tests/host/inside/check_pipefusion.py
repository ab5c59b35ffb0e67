"""PipeFusion through the stock KSampler: near to stock's result, and equal to it where it has to be; interrupted and
killed while each of its stages is at work."""

import itertools
import os
import signal
import threading
import time

import comfy.model_management
import comfy.samplers
import latent_preview
import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parallel_model import XDiTParallelModel
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint
from comfy_xdit_nodes.pool import connect

from comfy_xdit.messages import Cancel, Peek, Status
from comfy_xdit.pool.client import Pool, PoolError

KINDS = ("sd3", "flux", "pixart")
STOCK = 1e-4
"""How far an exact run may be from stock; of the latent's norm, in fp32."""

NEAR = 0.2
"""How far a run of few steps with old keys may be."""

STAGES = [(number, stage) for number in (2, 3) for stage in range(number)]


@pytest.fixture(scope="module")
def paths(models):
    return {kind: models / f"{kind}.safetensors" for kind in KINDS}


def parallel(path, setting):
    return XDiTParallelModel().parallelize(from_checkpoint(open_checkpoint(str(path))), pool=setting)[0]


def inputs_of(kind, **changes):
    return tiny.fitted(kind, {"latent_image": tiny.latent(30, 20), **changes})


def distance(ours, host):
    return float((ours - host).norm() / host.norm())


@pytest.fixture
def said(caplog):
    """What the log says on runs since the last look."""
    caplog.set_level("INFO", "comfy_xdit")

    def lines():
        found = " ".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return found

    return lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_whole_runs_step_mode_and_stock(kind, sampler, paths, pools, said):
    inputs = inputs_of(kind, sampler_name=sampler, steps=4)
    host = tiny.sample(tiny.load(paths[kind]), **inputs)

    def run(stages, **settings):
        out = tiny.sample(parallel(paths[kind], pools(stages, pipe=stages, **settings)), **inputs)
        return out, said()

    two, line = run(2, num_patches=4)
    assert "(2 ranks, pipe=2): " in line and "as a whole on the workers" in line
    assert 10 * STOCK < distance(two, host) < NEAR
    three, _ = run(3, num_patches=4)
    assert torch.equal(two, three), "the number of stages is no matter"
    assert distance(run(2, num_patches=4, warmup_steps=3)[0], host) < distance(two, host)
    assert distance(run(3, warmup_steps=1000)[0], host) <= STOCK
    step, line = run(2, num_patches=4, sampling="step")
    assert "the pipeline of 2 stages runs empty after every evaluation there, so it is exact" in line
    assert distance(step, host) <= STOCK


def test_every_sampler(paths, pools, said):
    """Families take leases. What only ComfyUI's own loop can run is exact, the others are near."""
    models = {kind: (tiny.load(path), parallel(path, pools(2, pipe=2))) for kind, path in paths.items()}
    for number, sampler in enumerate(comfy.samplers.KSampler.SAMPLERS):
        kind = KINDS[number % len(KINDS)]
        stock, ours = models[kind]
        host, mine = (tiny.sample(model, **inputs_of(kind, sampler_name=sampler)) for model in (stock, ours))
        is_whole = "as a whole on the workers" in said()
        assert is_whole == (sampler != "dpm_adaptive"), sampler
        assert distance(mine, host) <= (2 * NEAR if is_whole else STOCK), (sampler, distance(mine, host))


def acting(monkeypatch, act):
    """Have `act` called in the middle of the next run of a KSampler, by its previewer."""
    steps = itertools.count()

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format, denoised):
            if next(steps) == 2:
                act()

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *args: Previewer())


def pids(pool):
    return [rank["pid"] for rank in pool.status()["ranks"]]


@pytest.mark.parametrize(("stages", "stage"), STAGES)
def test_interrupt_while_a_stage_is_at_work(stages, stage, paths, pools, monkeypatch):
    """The stage is halted, so that all others wait for it when the interrupt comes; then it goes on."""
    setting = pools(stages, pipe=stages)
    model, pool = parallel(paths["sd3"], setting), connect(setting)
    expected, workers = tiny.sample(model), pids(pool)
    going_on = threading.Timer(1.0, os.kill, (workers[stage], signal.SIGCONT))
    aside, jobs = Pool.aside, []

    def act():
        os.kill(workers[stage], signal.SIGSTOP)
        going_on.start()
        time.sleep(0.5)
        comfy.model_management.interrupt_current_processing()

    def watched(this, message, **options):
        jobs.extend([message.job] if isinstance(message, Cancel) else [])
        return aside(this, message, **options)

    with monkeypatch.context() as patch, pool.lease():
        acting(patch, act)
        patch.setattr(Pool, "aside", watched)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tiny.sample(model, steps=900)
        pool.call(Status())  # In line behind the job.
        left = pool.aside(Peek(job=jobs[0])).value
    going_on.join()
    assert not left or left[-1]["step"] < 100, "it went on"
    assert torch.equal(tiny.sample(model), expected)
    assert pids(pool) == workers


@pytest.mark.parametrize(("stages", "stage"), STAGES)
def test_a_stage_killed_at_work(stages, stage, paths, pools, monkeypatch):
    setting = pools(stages, pipe=stages)
    model, pool = parallel(paths["flux"], setting), connect(setting)
    expected, workers = tiny.sample(model), pids(pool)
    with monkeypatch.context() as patch:
        acting(patch, lambda: os.kill(workers[stage], signal.SIGKILL))
        with pytest.raises(PoolError, match=r"^[^\n]*run the job again[^\n]*$"):
            tiny.sample(model, steps=900)
    assert torch.equal(tiny.sample(model), expected)
    assert workers[stage] not in pids(pool)
