"""What nodes and samplers may ask the skeleton is answered as a loaded model would, and it holds no numbers."""

import copy

import comfy.model_management as mm
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_xdit_nodes import skeleton
from comfy_xdit_nodes.absent import AbsentWeight
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.parity.skeleton_memory import skeleton_memory
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize

KINDS = ("sd3", "sd35", "flux", "pixart")


def ours(models, kind="sd3"):
    return from_checkpoint(open_checkpoint(str(models / f"{kind}.safetensors")))


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_stock(kind, models):
    stock, skeleton = tiny.load(models / f"{kind}.safetensors"), ours(models, kind)
    mm.load_models_gpu([stock])
    for asked in (
        lambda patcher: {
            name: (weight.shape, weight.dtype, weight.device, weight.nbytes)
            for name, weight in patcher.model.diffusion_model.state_dict().items()
        },
        lambda patcher: [(weight.device, weight.dtype) for weight in patcher.model.diffusion_model.parameters()],
        lambda patcher: [(weight.device, weight.dtype) for weight in patcher.model.diffusion_model.buffers()],
        lambda patcher: (patcher.model.get_dtype(), patcher.model_dtype(), patcher.model.diffusion_model.dtype),
        lambda patcher: (patcher.load_device, patcher.current_loaded_device(), patcher.model.device),
        lambda patcher: patcher.model.manual_cast_dtype,
        lambda patcher: (patcher.model_size(), mm.module_size(patcher.model)),
    ):
        assert asked(skeleton) == asked(stock)
    mm.unload_all_models()


def test_where_a_model_is_on_a_card(models, monkeypatch):
    """A card that is not there tells the two devices of a MODEL apart."""
    card = torch.device("cuda", 1)
    monkeypatch.setattr(mm, "get_torch_device", lambda: card)
    model = ours(models)
    assert all(weight.device == card for weight in model.model.diffusion_model.parameters())
    assert model.current_loaded_device() == card
    assert model.model.model_sampling.sigmas.device.type == "cpu", "what has numbers stays where they are"


SAMPLERS = {
    "of its parameters": lambda guider: next(guider.inner_model.diffusion_model.parameters()),
    "of the model": lambda guider: torch.empty(0, device=guider.inner_model.device),
    "of where it is loaded": lambda guider: torch.empty(0, device=guider.model_patcher.current_loaded_device()),
    "of where it is loaded to": lambda guider: torch.empty(0, device=guider.model_patcher.load_device),
    "made like a weight": lambda guider: torch.zeros_like(next(guider.inner_model.diffusion_model.parameters())),
    "made anew of a weight": lambda guider: next(guider.inner_model.diffusion_model.parameters()).new_ones(3),
    "of its buffers": lambda guider: [*guider.inner_model.buffers()][-1],
}


def following(where):
    """A sampler that keeps its tensors where the model is, as some node packs do."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        place = SAMPLERS[where](model.inner_model)
        x = x.to(place.device)
        rows = torch.ones([x.shape[0]], device=place.device)
        noise = torch.Generator(device=place.device).manual_seed(3)
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * rows, **(extra_args or {}))
            x = denoised + (x - denoised) / sigmas[i] * sigmas[i + 1]
            x = x + 0.01 * torch.randn(x.shape, generator=noise, device=place.device)
        return x

    return comfy.samplers.KSAMPLER(sample)


def run(model, where):
    """The latent of SamplerCustom with a sampler that follows the model."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    inputs = {"add_noise": True, "noise_seed": 7, "cfg": 3.0, "sampler": following(where), "sigmas": sigmas}
    inputs |= {"positive": tiny.conditioning(), "negative": tiny.conditioning(seed=11), "latent_image": tiny.latent()}
    if hasattr(custom.SamplerCustom, "define_schema"):
        return custom.SamplerCustom.execute(model=model, **inputs).result[0]["samples"]
    return custom.SamplerCustom().sample(model=model, **inputs)[0]["samples"]


@pytest.mark.parametrize("where", SAMPLERS)
def test_samplers_that_follow_the_models_device(where, models, fake):
    stock = tiny.load(models / "sd3.safetensors")
    expected = run(stock, where)
    assert torch.equal(run(parallelize(stock), where), expected)
    assert torch.equal(run(ours(models), where), expected)


@pytest.mark.parametrize("where", SAMPLERS)
def test_they_do_with_real_workers_too(where, models, pools):
    expected = run(tiny.load(models / "sd3.safetensors"), where)
    found = run(parallelize(ours(models), pools(1)), where)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: weight.sum(),
        lambda weight: weight.float().cpu().mean(),
        lambda weight: weight + 1,
        lambda weight: torch.ones(weight.shape) * weight,
        lambda weight: torch.empty(weight.shape).copy_(weight),
        lambda weight: weight.tolist(),
        lambda weight: weight.numpy(),
        lambda weight: torch.equal(weight, weight),
    ],
)
def test_who_wants_numbers_is_told_that_there_are_none(read, models):
    weight = next(ours(models).model.diffusion_model.parameters())
    with pytest.raises(ValueError, match="are on the pool, and a node wants their numbers here"):
        read(weight)


def test_a_weight_may_be_moved_cast_and_copied(models):
    model = ours(models).model.diffusion_model
    weight = next(model.parameters())
    assert isinstance(weight, torch.nn.Parameter) and isinstance(weight, AbsentWeight)
    moved = weight.to(torch.float16).to("meta")
    assert (moved.dtype, moved.device.type, moved.shape) == (torch.float16, "meta", weight.shape)
    assert isinstance(moved, AbsentWeight)
    assert isinstance(copy.deepcopy(weight), AbsentWeight)
    assert "AbsentWeight" in repr(weight)
    assert all(isinstance(value, AbsentWeight) for value in model.state_dict().values())
    moved = ours(models).model.diffusion_model.to(torch.float16)
    assert all(isinstance(value, AbsentWeight) and value.dtype == torch.float16 for value in moved.parameters())
    with torch.device("cpu"):
        assert weight.new_zeros(2, dtype=torch.float64).tolist() == [0.0, 0.0]


def test_it_holds_no_weights(tmp_path):
    found = skeleton_memory(tmp_path)
    assert found["parameters"] > 11e9
    assert found["host_grew_bytes"] < 16 * 2**20, found


def test_whatever_nodes_hang_on_a_model_goes_with_it(models, fake):
    """Also what this version of ComfyUI does not know yet, and what it has no more."""
    stock = tiny.load(models / "sd3.safetensors")
    stock.a_later_versions_dict = {"strength": 2}
    stock.memory_required = lambda input_shape: 1
    stock.force_cast_weights = True
    del stock.is_clip
    type(stock).clone, clone = lambda self: self, type(stock).clone
    try:
        model = parallelize(stock)
    finally:
        type(stock).clone = clone
    assert model.a_later_versions_dict == {"strength": 2}
    assert model.memory_required([1]) == 1 and model.force_cast_weights
    assert model.model is not stock.model


def test_what_would_break_a_model_on_a_pool_is_refused_by_name(models):
    stock = tiny.load(models / "sd3.safetensors")
    stock.partially_load = lambda *args, **kwargs: 0
    with pytest.raises(ValueError, match=r"another 'partially_load' \(.*check_skeleton.*; remove that node"):
        parallelize(stock)


def test_a_clone_of_a_models_wrappers_is_its_own(models):
    stock = tiny.load(models / "sd3.safetensors")
    stock.model_options["transformer_options"]["rope_options"] = {"scale_x": 1.0}
    model = parallelize(stock)
    stock.model_options["transformer_options"]["rope_options"]["scale_x"] = 2.0
    assert model.model_options["transformer_options"]["rope_options"] == {"scale_x": 1.0}
    assert skeleton.META.type == "meta"
