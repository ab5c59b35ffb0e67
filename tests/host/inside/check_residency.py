"""What the workers hold of a MODEL or VAE goes when it should, and nothing of a run stays behind in ComfyUI."""

import gc
import logging
import time
import weakref
from pathlib import Path

import comfy.model_management as mm
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from check_lora import TARGETS, with_lora
from comfy_xdit_nodes import remote, residency
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.residency import Residency
from comfy_xdit_nodes.samplers import XDiTKSampler, XDiTKSamplerAdvanced, XDiTSamplerCustomAdvanced

from comfy_xdit.pool.errors import PoolError


@pytest.fixture(autouse=True)
def no_collector():
    """Python's collector stands still: what goes, goes because nothing refers to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ours(models, kind="sd3"):
    return from_checkpoint(open_checkpoint(str(models / f"{kind}.safetensors")))


def until(condition, limit_s=30.0):
    """Wait for another thread; fails when it never comes."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def advanced(model):
    inputs = {
        **{"add_noise": "enable", "noise_seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "euler"},
        **{"scheduler": "simple", "positive": tiny.conditioning(), "negative": tiny.conditioning(seed=11)},
        **{"latent_image": tiny.latent(), "start_at_step": 0, "end_at_step": 3},
        "return_with_leftover_noise": "disable",
    }
    XDiTKSamplerAdvanced().sample(model=model, **inputs)


def guided(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.conditioning(), tiny.conditioning(seed=11))
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    XDiTSamplerCustomAdvanced().sample(
        guider=guider,
        noise=custom.Noise_RandomNoise(3),
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=sigmas,
        latent_image=tiny.latent(),
    )


NODES = {
    "KSampler (xDiT)": lambda model: tiny.sample(model, node=XDiTKSampler(), steps=1),
    "KSampler": lambda model: tiny.sample(model, steps=1),
    "Parallel Model (xDiT)": lambda model: tiny.sample(parallelize(model), steps=1),
    "KSampler Advanced (xDiT)": advanced,
    "SamplerCustomAdvanced (xDiT)": guided,
}


@pytest.fixture
def runs(monkeypatch):
    """Every sampling run that was begun, weakly."""
    seen, init = [], remote.Run.__init__

    def noted(self, *args, **kwargs):
        seen.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(remote.Run, "__init__", noted)
    return seen


@pytest.mark.parametrize(
    ("node", "source"),
    [*((node, "ours") for node in NODES), *((node, "stock") for node in NODES if node != "KSampler")],
)
def test_a_run_leaves_nothing_behind(node, source, models, fake, runs):
    model = ours(models) if source == "ours" else tiny.load(models / "sd3.safetensors")
    dressed = with_lora(model, "lora", TARGETS["sd3"], 0.5)
    NODES[node](dressed)
    assert runs and all(run() is None for run in runs), "a run is still there"
    skeleton = weakref.ref(model.model if source == "ours" else model.model.comfy_xdit.model)
    del model, dressed
    assert skeleton() is None, "the model is still there"


@pytest.mark.parametrize("sampling", ["auto", "step"])
def test_a_run_of_real_workers_leaves_nothing_behind(sampling, models, pools, runs):
    model = ours(models)
    tiny.sample(model, node=XDiTKSampler(), pool=pools(1, sampling=sampling))
    assert runs and all(run() is None for run in runs), "a run is still there"
    skeleton = weakref.ref(model.model)
    mm.unload_all_models()
    del model
    assert skeleton() is None, "the model is still there"


@pytest.mark.parametrize("node", NODES)
def test_unload_models_frees_the_workers_every_time(node, models, fake):
    source = ours(models)
    for strength in (0.5, 0.7, 0.9):
        NODES[node](with_lora(source, "lora", TARGETS["sd3"], strength))
        assert fake.models
        gc.collect()
        mm.unload_all_models()
        assert not fake.models, "the workers still hold the model"


@pytest.mark.parametrize("node", ["KSampler (xDiT)", "Parallel Model (xDiT)"])
def test_no_warning_in_many_changes_of_strength(node, models, fake, caplog, monkeypatch):
    collected = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: collected.append(args) or collect(*args))
    source, dressed = ours(models), None
    with caplog.at_level(logging.INFO):
        for i in range(50):
            # As ComfyUI's cache does: the last one is there until the next one is made.
            dressed = with_lora(source, "lora", TARGETS["sd3"], 0.02 * i)
            if i % 10 == 9:
                # Takes what referred to itself: the last one with the run that was made of it.
                collect()
            NODES[node](dressed)
    assert not [record for record in caplog.records if "memory leak" in record.getMessage()]
    assert not collected
    mm.unload_all_models()
    assert not fake.models


def test_a_copy_in_shared_memory_goes_with_its_model(models, fake):
    stock = tiny.load(models / "flux.safetensors")
    tiny.sample(stock, node=XDiTKSampler())
    path = Path(fake.loaded.path)
    assert path.exists() and fake.models
    del stock
    assert not path.exists()
    until(lambda: not fake.models)


def test_a_model_with_a_file_stays_warm(models, fake):
    model = ours(models)
    tiny.sample(model)
    gone = weakref.ref(model.model)
    del model
    assert gone() is None
    assert fake.models, "another run may want it"


class APool:
    """A pool that is stopped, busy for ever with somebody else's job, or out of the reach of this process."""

    name = "other"

    def __init__(self, state):
        self.state, self.started, self.unloaded = state, 0, []

    def status(self):
        if self.state == "stopped":
            raise PoolError("no pool 'other' runs")
        if self.state == "broken":
            raise OSError("Too many open files")
        return {}

    def call(self, message, *, poll=None, timeout_s=None):
        self.started += self.state == "stopped"
        while self.state == "busy":
            poll()
        self.unloaded += message.keys


@pytest.mark.parametrize("what", ["model", "VAE"])
def test_unloading_starts_no_pool_and_does_not_hang(what, monkeypatch, caplog):
    monkeypatch.setattr(residency, "UNLOAD_PATIENCE_S", 0.05)
    held = Residency(what)
    stopped, busy = APool("stopped"), APool("busy")
    held.add(stopped, "a")
    held.unload()
    assert not stopped.started and not held
    held.add(busy, "b")
    held.unload()
    assert "busy with another client's job" in caplog.text
    assert held, "it is still there"
    caplog.clear()
    held.unload()
    assert not caplog.text, "it is said already"
    held.add(busy, "c")
    held.unload()
    assert len(caplog.records) == 1
    held.add(busy, "b")
    busy.state = "free"
    held.unload()
    assert busy.unloaded == ["b"] and not held


def test_what_nobody_can_load_again_goes_with_comfyui(models, fake, monkeypatch):
    copied, warm = tiny.load(models / "flux.safetensors"), ours(models)
    tiny.sample(copied, node=XDiTKSampler())
    key = fake.loaded.model
    tiny.sample(warm)
    assert len(fake.models) == 2
    residency.unload_at_exit()
    assert len(fake.models) == 1 and key not in fake.models


def test_what_is_gone_is_unloaded_when_its_pool_is_free_again(monkeypatch):
    monkeypatch.setattr(residency, "UNLOAD_PATIENCE_S", 0.05)
    held, pool = Residency("model"), APool("busy")
    held.add(pool, "a")
    owner = torch.nn.Module()
    held.ends_with(owner)
    del owner
    pool.state = "free"
    until(lambda: pool.unloaded == ["a"])


def test_an_error_of_any_kind_ends_no_unloading(caplog):
    broken, free = APool("broken"), APool("free")
    for pool in (broken, free):
        held, owner = Residency("model"), torch.nn.Module()
        held.add(pool, "a")
        held.ends_with(owner)
        del owner
    until(lambda: free.unloaded == ["a"])
    assert "Too many open files" in caplog.text


def test_a_forked_child_that_ends_unloads_nothing(monkeypatch):
    held, pool, owner = Residency("model"), APool("free"), torch.nn.Module()
    held.add(pool, "a")
    held.ends_with(owner)
    with monkeypatch.context() as child:
        child.setattr(residency.os, "getpid", lambda: 1)
        residency.unload_at_exit()
    assert not pool.unloaded
    residency.unload_at_exit()
    assert pool.unloaded == ["a"]
