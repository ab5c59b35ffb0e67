"""ComfyUI gives its memory on the pool's cards to a model that is loaded there, and degrees go by what is free then."""

import weakref

import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch
from check_lora import TARGETS, with_lora
from check_residency import until
from comfy_xdit_nodes import host_memory
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint
from comfy_xdit_nodes.pool import connect
from comfy_xdit_nodes.residency import Residency
from comfy_xdit_nodes.samplers import XDiTKSampler

from comfy_xdit.cost import on_pool

GB = 10**9
CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


def ours(models, kind="sd3", dtype=None):
    return from_checkpoint(open_checkpoint(str(models / f"{kind}.safetensors")), dtype=dtype)


class Cards:
    """Cards of 24 GB that are not there; `encoders` are models that ComfyUI has loaded on them, 10 GB each.

    unused: what torch keeps in ComfyUI's process, until it is told to empty its cache.
    """

    def __init__(self):
        self.encoders, self.unused = [], 1 * GB

    def load_encoder(self, card=CARD):
        patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), card, torch.device("cpu"))
        patcher.model.model_loaded_weight_memory = patcher.size = 10 * GB
        loaded = mm.LoadedModel(patcher)
        loaded.real_model = weakref.ref(patcher.model)
        loaded.model_finalizer = weakref.finalize(patcher.model, lambda: None)
        mm.current_loaded_models.append(loaded)
        self.encoders.append(patcher)
        return patcher

    def has(self, patcher):
        return any(loaded.model is patcher for loaded in mm.current_loaded_models)

    def free(self, card=None, torch_free_too=False):
        if card is None or card.type == "cpu":
            return (64 * GB, 0) if torch_free_too else 64 * GB
        used = 10 * GB * sum(self.has(patcher) and patcher.load_device == card for patcher in self.encoders)
        free = 24 * GB - used
        return (free, self.unused) if torch_free_too else free

    def empty_cache(self, *args, **kwargs):
        self.unused = 0


@pytest.fixture
def cards(monkeypatch):
    cards = Cards()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(mm, "get_free_memory", cards.free)
    monkeypatch.setattr(mm, "soft_empty_cache", cards.empty_cache)
    yield cards
    mm.current_loaded_models[:] = [loaded for loaded in mm.current_loaded_models if loaded.model not in cards.encoders]


def test_room_is_made_before_a_model_is_loaded_and_then_no_more(models, fake, cards):
    fake.devices = ["cuda:0"]
    encoder, model = cards.load_encoder(), ours(models)
    load, there = fake.on_LoadModel, []
    fake.on_LoadModel = lambda message: there.append(cards.has(encoder)) or load(message)
    tiny.sample(model)
    assert there == [False] and cards.unused == 0
    again = cards.load_encoder()
    tiny.sample(model)
    assert cards.has(again), "the model is resident: nothing moves"
    mm.unload_all_models()
    third = cards.load_encoder()
    tiny.sample(model)
    assert not cards.has(third)
    fake.models.clear()  # A worker died, or another program needed the room.
    fourth = cards.load_encoder()
    tiny.sample(model)
    assert not cards.has(fourth)


@pytest.mark.parametrize(
    ("devices", "visible", "stays"),
    [
        (["cuda:0", "cuda:1"], None, False),
        (["cuda:1"], None, True),
        (["cpu"], None, True),
        (["cuda:1"], "1", False),  # ComfyUI's cuda:0 may be the pool's cuda:1.
    ],
)
def test_only_cards_that_are_shared(devices, visible, stays, models, fake, cards, monkeypatch):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    fake.devices = devices
    encoder = cards.load_encoder()
    tiny.sample(ours(models))
    assert cards.has(encoder) == stays


def test_the_workers_models_are_none_of_comfyuis(models, fake, cards):
    first = ours(models)
    tiny.sample(first)
    fake.devices = ["cuda:0"]
    cards.load_encoder()
    tiny.sample(ours(models, "flux"))
    assert len(fake.models) == 2


def test_a_stopped_pool_is_no_hindrance(cards):
    from comfy_xdit.pool.errors import PoolError

    class Stopped:
        name, devices = "gone", ["cuda:0"]

        def status(self):
            raise PoolError("no pool 'gone' runs")

    encoder = cards.load_encoder()
    assert host_memory.make_room(Stopped(), Residency("VAE"), "a") == {}
    assert not cards.has(encoder)


def test_a_vae_that_is_resident_moves_nothing(cards):
    class Running:
        name, devices = "runs", ["cuda:0"]

        def status(self):
            return {"ranks": [{"rank": 0, "device": "cuda:0", "vaes": ["a"]}]}

    pool, held = Running(), Residency("VAE")
    held.add(pool, "a")
    encoder = cards.load_encoder()
    assert host_memory.make_room(pool, held, "a") is None and cards.has(encoder)
    assert host_memory.make_room(pool, held, "b") == {} and not cards.has(encoder)


def test_degrees_go_by_what_is_free(models, fake, cards, monkeypatch):
    told = []
    monkeypatch.setattr(on_pool, "cost_on", lambda pool, path, **work: told.append(work))
    fake.devices, fake.num_ranks = ["cuda:0", "cuda:1"], 2
    # Of 24 GB ComfyUI has 11, and the pool 3 for another model, which would make room.
    fake.memory = {"device_bytes": 3 * GB, "device_free_bytes": 10 * GB, "device_total_bytes": 24 * GB}
    cards.load_encoder()
    cards.load_encoder(OTHER)
    model = ours(models)
    tiny.sample(model)
    assert told[0]["room_bytes"] == 3 * GB + 10 * GB + 11 * GB - 1 * GB
    fake.memory["device_free_bytes"] = 1 * GB
    tiny.sample(model)
    assert told[-1]["room_bytes"] == told[0]["room_bytes"], "a choice does not change with what comes and goes"


def test_parameters_are_priced_as_the_workers_keep_them(models):
    def kept(model):
        return model.load_message().param_bytes

    assert kept(ours(models, "flux")) == 4
    assert kept(ours(models, "flux", torch.bfloat16)) == 2
    fp8 = ours(models, "flux", torch.float8_e4m3fn)
    assert kept(fp8) == 1
    dressed = with_lora(fp8, "lora", TARGETS["flux"], 0.5)
    (key,) = dressed.patches
    total = sum(weight.numel() for weight in fp8.model.parameters())
    touched = fp8.model.state_dict()[key].numel()
    compute = fp8.model.manual_cast_dtype.itemsize
    assert kept(dressed) == pytest.approx(1 + (compute - 1) * touched / total)
    assert kept(with_lora(ours(models, "flux", torch.bfloat16), "lora", TARGETS["flux"], 0.5)) == 2


def test_real_workers_tell_what_is_resident(models, pools):
    setting, model = pools(1), ours(models)
    tiny.sample(model, node=XDiTKSampler(), pool=setting)
    pool, key = connect(setting), model.load_message().model.model
    # Their word is as old as the last sign of life.
    until(lambda: host_memory.make_room(pool, model.model.residency, key) is None)
    model.model.residency.unload()
    assert host_memory.make_room(pool, model.model.residency, key) is not None
