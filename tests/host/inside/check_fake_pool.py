"""The host side alone: with ComfyUI's own model behind the messages, results equal stock bit for bit."""

import dataclasses
from types import SimpleNamespace

import comfy.model_management as mm
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.samplers import CFGGuider
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.pool import PoolSetting
from comfy_xdit_nodes.remote import _longest_silence
from comfy_xdit_nodes.run import count_chunks
from comfy_xdit_nodes.samplers import XDiTKSampler

from comfy_xdit.pool.errors import PoolError
from comfy_xdit.trajectory import SamplerPreview

KINDS = ("sd3", "sd35", "flux", "schnell", "pixart", "alpha")


def ours(path):
    return from_checkpoint(open_checkpoint(str(path)))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_stock(kind, models, fake):
    path = models / f"{kind}.safetensors"
    stock = tiny.sample(tiny.load(path))
    assert stock.isfinite().all() and stock.std() > 0.1
    assert torch.equal(tiny.sample(ours(path)), stock)
    assert fake.log[:3] == ["LoadModel", "Hold", "Denoise"]
    assert fake.log.count("Denoise") == 3 and not fake.held and not fake.leases


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
@pytest.mark.parametrize(
    "changes",
    [
        {"sampler_name": "dpmpp_2m", "scheduler": "karras"},
        {"sampler_name": "euler_ancestral", "denoise": 0.6},
        {"sampler_name": "uni_pc", "cfg": 1.0},
        {"latent_image": tiny.latent(18, 22, batch=2)},
        {"latent_image": {**tiny.latent(), "noise_mask": torch.ones(1, 1, 16, 8).repeat(1, 1, 1, 2).tril()}},
    ],
)
def test_equals_stock_with(kind, changes, models, fake):
    path, inputs = models / f"{kind}.safetensors", tiny.fitted(kind, changes)
    assert torch.equal(tiny.sample(ours(path), **inputs), tiny.sample(tiny.load(path), **inputs))


@pytest.mark.parametrize("kind", ["sd35", "flux", "pixart"])
def test_stock_model_through_its_own_file_or_memory(kind, models, fake):
    stock = tiny.load(models / f"{kind}.safetensors")
    expected = tiny.sample(stock)
    assert torch.equal(tiny.sample(stock, node=XDiTKSampler()), expected)
    assert torch.equal(tiny.sample(stock, node=XDiTKSampler()), expected)
    assert fake.log.count("SetPatches") == 0 and len(fake.models) == 1


def test_memory_is_free_without_the_model(models, fake):
    path = models / "sd3.safetensors"
    model = ours(path)
    tiny.sample(model)
    assert fake.models and any(loaded.model is model for loaded in mm.current_loaded_models)
    mm.free_memory(5e10, mm.get_torch_device())
    assert fake.models, "memory pressure on the host must not unload the workers"
    mm.unload_all_models()
    assert not fake.models
    assert torch.equal(tiny.sample(model), tiny.sample(tiny.load(path)))


def test_a_rank_that_wears_other_patches_is_dressed_again(models, fake, monkeypatch):
    model = ours(models / "sd3.safetensors")
    tiny.sample(model)
    assert "SetPatches" not in fake.log
    call_all = type(fake).call_all

    def other_rank_failed(self, message, **options):
        answers = call_all(self, message, **options)
        if type(message).__name__ == "LoadModel":
            answers.append(dataclasses.replace(answers[0], value={"patches_id": "being changed"}))
        return answers

    monkeypatch.setattr(type(fake), "call_all", other_rank_failed)
    tiny.sample(model)
    assert fake.log.count("SetPatches") == 1


@pytest.mark.parametrize(
    ("after", "num_calls", "longest"), [([0, 1, 2], 3, 2), ([1, 3], 4, 3), ([0, 0], 6, 6), ([], 5, 6)]
)
def test_how_long_a_run_may_say_nothing(after, num_calls, longest):
    previews = [SamplerPreview(after=number, step=0, total=1, denoised="x") for number in after]
    assert _longest_silence(SimpleNamespace(previews=previews, calls=[None] * num_calls)) == longest


def test_guidance_of_another_kind_counts_all_its_conditionings(models):
    model = tiny.load(models / "sd3.safetensors")
    conds = {"positive": tiny.conditioning(), "middle": tiny.conditioning(), "negative": tiny.conditioning()}
    for guider, number in ((custom.Guider_DualCFG, 3), (custom.Guider_Basic, 1), (CFGGuider, 1)):
        made = guider(model)
        made.conds = conds
        assert count_chunks(made) == number
    made.set_cfg(3.0)
    assert count_chunks(made) == 3


def test_another_model_makes_room(models, fake, monkeypatch):
    load = type(fake).on_LoadModel

    def on_a_small_device(self, message):
        if self.models.keys() - {message.model}:
            raise PoolError("worker 0 ran out of memory", kind="memory")
        return load(self, message)

    monkeypatch.setattr(type(fake), "on_LoadModel", on_a_small_device)
    for kind in ("sd3", "flux", "sd3"):
        path = models / f"{kind}.safetensors"
        assert torch.equal(tiny.sample(ours(path)), tiny.sample(tiny.load(path)))
        assert len(fake.models) == 1


def test_lengths_that_differ_meet_in_one_message(models, fake):
    path = models / "sd3.safetensors"
    negative = tiny.conditioning(33, seed=11)
    expected = tiny.sample(tiny.load(path), negative=negative)
    assert torch.equal(tiny.sample(ours(path), negative=negative), expected)
    assert [calls for calls, _, _ in fake.calls] == [1] * 6
    fake.num_ranks, fake.calls = 2, []
    model = parallelize(ours(path), PoolSetting(cfg=2))
    assert torch.equal(tiny.sample(model, negative=negative), expected)
    assert [(calls, chunks) for calls, chunks, _ in fake.calls] == [(2, [1, 1])] * 3


def test_interrupt_stops_within_a_step(models, fake):
    def interrupt(step, *_):
        if step == 0:
            mm.interrupt_current_processing()

    import comfy.sample

    model = ours(models / "sd3.safetensors")
    noise = torch.randn(1, 16, 16, 16)
    conds = tiny.conditioning(), tiny.conditioning(seed=11)
    with pytest.raises(mm.InterruptProcessingException):
        comfy.sample.sample(
            model, noise, 5, 3.0, "euler", "simple", *conds, 0 * noise, callback=interrupt, seed=1
        )
    assert len(fake.calls) == 1 and not fake.leases
    assert tiny.sample(model).isfinite().all()
