"""Calls of ComfyUI's own classes: several as one, their parts of the latent, and what runs beside them."""

import dataclasses
import types

import pytest
import torch

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Tuple
from comfy_xdit.native.calls import alike
from comfy_xdit.native.families import FAMILIES

LTXAV, MINIMAX, QWEN = FAMILIES["ltx-2"], FAMILIES["minimax-h3"], FAMILIES["qwen-image"]


def call(*shapes, seed=0, **more):
    made = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=made) for shape in shapes]
    steps = torch.full((shapes[0][0],), 0.7)
    several = len(parts) > 1
    return {
        "x": parts if several else parts[0],
        "timestep": Tuple(items=[steps] * len(parts)) if several else steps,
        "context": torch.randn(1, 9, 8, generator=made),
        "transformer_options": {},
        **more,
    }


def test_calls_of_several_latents_go_together():
    calls = [call((1, 4, 2, 3, 3), (1, 2, 5, 4), seed=seed, frame_rate=24) for seed in (1, 2)]
    made = LTXAV.batched(calls)
    assert [tuple(part.shape) for part in made["x"]] == [(2, 4, 2, 3, 3), (2, 2, 5, 4)]
    assert [tuple(part.shape) for part in made["timestep"].items] == [(2,), (2,)]
    assert made["context"].shape == (2, 9, 8) and made["frame_rate"] == 24
    for row, one in enumerate(calls):
        assert alike(LTXAV.of_rows(made, range(row, row + 1)), one)


def test_calls_that_stay_apart():
    one = call((1, 16, 1, 4, 4), ref_latents=[torch.ones(1, 16, 1, 2, 2)])
    others = {
        "another length": {**one, "context": torch.ones(1, 7, 8)},
        "another number of references": {**one, "ref_latents": one["ref_latents"] * 2},
        "another constant": {**one, "ref_latents_method": "offset"},
        "other options": {**one, "transformer_options": {"a": 1}},
    }
    assert QWEN.batched([one, one])["ref_latents"][0].shape[0] == 2
    assert QWEN.batched([one]) is None
    for why, other in others.items():
        assert QWEN.batched([one, other]) is None, why
    constant = {**one, "ref_latents_method": "index"}
    assert QWEN.batched([constant, {**one, "ref_latents_method": "offset"}]) is None
    assert QWEN.batched([constant, constant])["ref_latents_method"] == "index"


def test_a_model_of_one_row():
    one = call((1, 24, 2, 4, 4), (1, 32, 2, 3))
    assert MINIMAX.batched([one, one]) is None
    two = {**one, "x": [torch.cat([part, part]) for part in one["x"]], "timestep": torch.ones(2)}
    with pytest.raises(InputError, match="MiniMax-H3 takes a batch of 1, not of 2"):
        MINIMAX.check_arguments(two)


def test_a_sampler_s_latent_becomes_the_model_s():
    packed, step = torch.arange(20.0).reshape(1, 1, 20), torch.tensor([0.5])
    how = {"latent_shapes": [[2, 3], [7, 2]], "timesteps": ["a_timestep"]}
    made = LTXAV.call_of(packed, step, {**how, "frame_rate": 24})
    assert alike(made["x"], [packed[..., :6].reshape(1, 2, 3), packed[..., 6:].reshape(1, 7, 2)])
    assert made["timestep"] is made["a_timestep"] is step
    assert made.keys() == {"x", "timestep", "a_timestep", "frame_rate"}


def test_only_what_a_family_names_runs_beside_evaluations():
    model = types.SimpleNamespace(module=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="can't be asked for 'to'"):
        MINIMAX.prepare(model, "to", ["cpu"], {})
    family = dataclasses.replace(MINIMAX, prepares=("forward",))
    assert torch.equal(family.prepare(model, "forward", [torch.ones(2)], {}), model.module(torch.ones(2)))
    with pytest.raises(InputError, match="text encoders"):
        family.prepare(model, "forward", [torch.ones(1, 3)], {})
