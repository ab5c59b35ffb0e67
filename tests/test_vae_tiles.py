"""Tiles of a VAE's own loop, dealt out to ranks, and the hash by which two processes' VAEs are compared."""

import copy

import pytest
import torch
from ranks import Ranks
from tiled_toy import ToyVAE, deal
from torch import nn

from comfy_xdit.native.vae_hash import vae_hash

SIZE = 4
SAMPLES = torch.randn(1, 1, 20, generator=torch.Generator().manual_seed(3))
"""Seven tiles: the last of two numbers, and the last round short, on two ranks and on three."""


@pytest.fixture(scope="module", params=[2, 3])
def dealt(request):
    """`dealt(**arguments)` → each rank's part."""
    with Ranks(request.param) as ranks:

        def run(**arguments):
            arguments = {"samples": SAMPLES, "size": SIZE, **arguments}
            return ranks.run("run_of", module="tiled_toy", function="deal", arguments=arguments)

        yield run


def test_ranks_share_the_tiles_and_rank_0_blends_them_in_order(dealt):
    parts = dealt()
    expected = ToyVAE().decode_tiled(SAMPLES, SIZE)
    assert torch.equal(parts[0]["result"], expected) and parts[0]["tiles"] == 7
    assert all(part["result"] is None for part in parts[1:])
    begins = [SAMPLES[0, 0, begin].item() for begin in range(0, 19, SIZE - 1)]
    assert [part["seen"] for part in parts] == [begins[rank :: len(parts)] for rank in range(len(parts))]
    assert parts[0]["steps"][-1] == (7, 7) and len(parts[0]["steps"]) == -(-7 // len(parts))


def test_one_rank_alone():
    part = deal(SAMPLES, SIZE)
    assert torch.equal(part["result"], ToyVAE().decode_tiled(SAMPLES, SIZE))
    assert part["steps"] == [(step, 7) for step in range(1, 8)]


def test_all_stop_when_one_is_told_to(dealt):
    parts = dealt(stops_at=2)
    assert {part["error"] for part in parts} == {"Stopped: "}
    assert {len(part["seen"]) for part in parts} == {2}


def test_all_end_when_one_refuses_its_tile(dealt):
    parts = dealt(refuses=SAMPLES[0, 0, SIZE].item())
    assert parts[1]["error"] == "InputError: this tile is refused"
    assert {part["error"] for part in parts} - {parts[1]["error"]} == {"InputError: the VAE of another worker refused"}


class Hashed:
    """Something with layers and settings, as ComfyUI's VAE object is."""

    def __init__(self, ratio=8, scale=2.0):
        self.first_stage_model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
        self.upscale_ratio = (lambda frames: ratio * frames, 8)
        self.process_output = lambda image: image * scale
        self.device = torch.device("cpu")


def changed_padding(vae):
    vae.first_stage_model[0].padding_mode = "circular"


def changed_layer(vae):
    vae.first_stage_model[1] = nn.BatchNorm2d(4)


def changed_function(vae):
    vae.process_output = lambda image: image * 2.0


def changed_forward(vae):
    vae.first_stage_model[0].forward = lambda x: x


@pytest.mark.parametrize("change", [changed_padding, changed_layer, changed_function, changed_forward])
def test_a_change_changes_the_hash(change):
    vae = Hashed()
    change(vae)
    assert vae_hash(vae) != vae_hash(Hashed())


def test_what_functions_were_made_with_counts():
    assert len({vae_hash(vae) for vae in (Hashed(), Hashed(ratio=4), Hashed(scale=1.0))}) == 3


def test_weights_dtype_and_place_do_not_count():
    vae, elsewhere = Hashed(), Hashed()
    elsewhere.first_stage_model = copy.deepcopy(vae.first_stage_model).half().requires_grad_(False).eval()
    elsewhere.device = torch.device("meta")
    elsewhere.first_stage_model.model_loaded_weight_memory = 5
    assert vae_hash(vae) == vae_hash(Hashed()) == vae_hash(elsewhere)
