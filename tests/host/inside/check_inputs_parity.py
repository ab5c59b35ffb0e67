"""What ComfyUI's nodes add to a Flux call (references, masks, no pooled text) means the same to our Flux."""

import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny

from comfy_xdit.models.resident import load
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.denoise import denoise
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.spec import ParallelSpec

HEIGHT, WIDTH, TOKENS = 9, 14, 7


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux_call(**more):
    time = torch.tensor([0.7313, 0.2])
    call = {"x": rand(2, 16, HEIGHT, WIDTH), "timestep": time, "context": rand(2, TOKENS, tiny.CONTEXT, seed=1)}
    return {**call, "y": rand(2, tiny.POOLED, seed=2), "guidance": 3.0 + time, **more}


def outputs(path, call, dtype=torch.float32):
    """ComfyUI's model's, and that of our engine on one rank."""
    stock = tiny.load(path, dtype, dtype).model.diffusion_model
    resident = load(open_checkpoint(str(path)).load(storage=dtype, compute=dtype), "cpu")
    with ParallelContext(ParallelSpec(), GroupCache(1)) as context, torch.inference_mode():
        (ours,), _ = denoise(resident, [dict(call)], [1], context)
        given = dict(call)
        theirs = stock(given.pop("x"), given.pop("timestep"), **given)
    return ours, theirs


def assert_equal(path, call):
    ours, theirs = outputs(path, call)
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("method", [None, "offset", "index", "uxo"])
def test_reference_latents(method, models):
    """One wider than the image, one higher, both odd: each method puts them elsewhere."""
    references = [rand(2, 16, 7, 11, seed=3), rand(2, 16, 12, 5, seed=4), rand(2, 16, 3, 9, seed=5)]
    more = {"ref_latents_method": method} if method else {}
    assert_equal(models / "flux.safetensors", flux_call(ref_latents=references, **more))


@pytest.mark.parametrize("kind", ["flux", "schnell"])
def test_no_pooled_text(kind, models):
    call = flux_call()
    del call["y"]
    assert_equal(models / f"{kind}.safetensors", call)


def test_a_mask_over_all_pairs(models):
    """As style models add it: text to image, additive."""
    num_tokens = TOKENS + -(-HEIGHT // 2) * -(-WIDTH // 2)
    mask = rand(2, num_tokens, num_tokens, seed=6)
    mask[:, :, 2:4] = -torch.inf
    assert_equal(models / "flux.safetensors", flux_call(attention_mask=mask))


def test_timesteps_in_bfloat16(models):
    """As near to ComfyUI as two ways to sum: with the timestep rounded to bfloat16 it is further off."""
    call = {key: value if key == "timestep" else value.bfloat16() for key, value in flux_call().items()}
    ours, theirs = outputs(models / "flux.safetensors", call, torch.bfloat16)
    exact, _ = outputs(models / "flux.safetensors", flux_call())
    stock_error = (theirs.float() - exact).norm()
    assert (ours.float() - exact).norm() <= 1.2 * stock_error
