"""MODELs without a file that the workers can load: a copy in ComfyUI's own layout makes the same model."""

import gc
import os

import comfy.model_management
import comfy.sd
import native_models as make
import pytest
import torch
from check_native_load import FLUX, stock
from check_native_lora import CPU, different, dressed, some_loras, tensors
from check_native_sample import CASES
from comfy_xdit_nodes.export import is_copy
from comfy_xdit_nodes.native import export as exporting
from comfy_xdit_nodes.native.export import export
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.source import describe
from comfy_xdit_nodes.patcher import parallelize

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")


class Owner:
    pass


@pytest.fixture
def owner():
    return Owner()


def on_worker(message):
    from comfy_xdit.native.load import load

    return load(message.path, message.source, CPU).model


@pytest.mark.parametrize("form", make.FLUX_FORMS)
def test_formats(form, owner, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux(form))
    patcher = comfy.sd.load_diffusion_model(str(path))
    message = export(patcher, owner)
    model = on_worker(message)
    assert not different(tensors(model), tensors(patcher.model))
    output, call = stock(patcher, (1, 16, 16, 12), FLUX | {"guidance": (1,)})
    given = dict(call)
    assert torch.equal(model.diffusion_model(given.pop("x"), given.pop("timestep"), **given), output)
    # From a MODEL with LoRA on it, too, the weights without.
    patched = dressed(patcher, *some_loras(patcher))
    comfy.model_management.load_models_gpu([patched])
    assert not different(tensors(on_worker(export(patched, owner))), tensors(model))
    assert different(tensors(patched.model), tensors(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dtypes_that_the_user_chose(dtype, owner, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("fp32"))
    patcher = comfy.sd.load_diffusion_model(str(path), {"dtype": dtype})
    assert not different(tensors(on_worker(export(patcher, owner))), tensors(patcher.model))


@pytest.mark.parametrize(
    ("name", "form"), [("wan", None), ("wan", "nvfp4"), ("qwen", "int8_tensorwise")]
)
def test_whole_workflows(name, form, tmp_path, pools):
    """The weights were changed in place: no longer those of the file."""
    weights = make.weights(getattr(make, name)())
    path = make.save(tmp_path / "a.safetensors", make.quantised(weights, [form]) if form else weights)
    model, case = comfy.sd.load_diffusion_model(str(path)), CASES[name]
    before = case.run(model)
    for key, weight in model.model.diffusion_model.named_parameters():
        if key.endswith("bias") and weight.numel() > 8:
            weight.mul_(1.5)
    expected = case.run(model)
    assert not torch.equal(before, expected) and describe(model) is None
    ours = parallelize(model, pools(1))
    copy = ours.model.checkpoint.path
    assert is_copy(copy)
    assert torch.equal(case.run(ours), expected)
    del ours, model
    comfy.model_management.unload_all_models()
    gc.collect()
    assert not os.path.exists(copy), "it goes with the MODEL"


def test_what_would_not_be_found_again(owner, tmp_path, monkeypatch):
    patcher = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "flux.safetensors", make.flux("nvfp4"))))
    state = exporting.pristine(patcher)
    changed = {
        "another model": {key: weight for key, weight in state.items() if "single_blocks.1" not in key},
        "a prefix": {f"model.diffusion_model.{key}": weight for key, weight in state.items()},
        "no note": {key: weight for key, weight in state.items() if key.endswith("img_in.weight")},
    }
    for what, weights in changed.items():
        monkeypatch.setattr(exporting, "pristine", lambda patcher, weights=weights: weights)
        with pytest.raises(ValueError, match=r"would not find it again .* load it with"):
            export(patcher, owner)
            raise AssertionError(what)
    state["img_in.weight"] = patcher.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    monkeypatch.setattr(exporting, "pristine", lambda patcher: state)
    with pytest.raises(ValueError, match=r"img_in\.weight is in QuantizedTensor; load it with"):
        export(patcher, owner)


def test_layers_of_another_nodes_making(owner, tmp_path):
    """As ComfyUI-GGUF's."""
    import comfy.ops

    class Layers(comfy.ops.manual_cast):
        pass

    weights = make.flux("bf16")
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"custom_operations": Layers})
    assert describe(patcher) is None
    with pytest.raises(ValueError, match=r"its layers come from .*Layers"):
        export(patcher, owner)
