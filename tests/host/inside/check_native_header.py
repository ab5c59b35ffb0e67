"""XDiTLoadDiffusionModel with ComfyUI's own classes: the MODEL that the stock loader makes, without the weights."""

import comfy.sd
import native_models as make
import pytest
import torch
from check_native_lora import block_lora, dressed
from check_native_sample import CASES, plain
from comfy_xdit_nodes import patcher as patchers
from comfy_xdit_nodes.loader import WEIGHT_DTYPES, XDiTLoadDiffusionModel
from comfy_xdit_nodes.native import checkpoint
from comfy_xdit_nodes.native.checkpoint import comfy_checkpoint, comfy_family
from comfy_xdit_nodes.native.header import open_header
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")



def wan_fp8():
    return {key: one.to(make.FP8) if one.ndim == 2 else one for key, one in make.weights(make.wan()).items()}


FILES = {
    **{f"flux {form}": lambda form=form: make.flux(form) for form in make.FLUX_FORMS},
    "wan bf16": lambda: make.weights(make.wan()),
    "wan fp16": lambda: make.weights(make.wan(), torch.float16),
    "wan fp8": wan_fp8,
    "qwen nvfp4": lambda: make.quantised(make.weights(make.qwen()), ["nvfp4"]),
    "wan mixed": lambda: make.quantised(make.weights(make.wan()), ["float8_e4m3fn", "int8_tensorwise", None]),
}
STOCK_OPTIONS = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


@pytest.mark.parametrize("name", FILES)
def test_the_stock_loaders_model(name, tmp_path):
    """Class, choices and names are those of the loaded MODEL, for each choice that the node offers."""
    path = make.save(tmp_path / "model.safetensors", FILES[name]())
    for weight_dtype, options in STOCK_OPTIONS.items():
        stock = comfy.sd.load_diffusion_model(str(path), dict(options))
        found = open_header(str(path), dtype=WEIGHT_DTYPES[weight_dtype], fp8="fast" in weight_dtype)
        family = comfy_family(stock)
        assert (found is None) == (family is None)
        if found is None:
            continue
        config, ours = found
        theirs = comfy_checkpoint(stock, family, object())
        assert ours.message == theirs.message and ours.shape == theirs.shape and ours.num_dims == theirs.num_dims
        assert ours.is_quantised == theirs.is_quantised and ours.config == theirs.config
        expected = stock.model.model_config
        assert type(config) is type(expected) and config.optimizations == expected.optimizations
        shapes = [{key: (one.shape, one.dtype) for key, one in each.meta.items()} for each in (ours, theirs)]
        assert shapes[0] == shapes[1]


def test_what_is_not_for_this_way(tmp_path, monkeypatch):
    def opened(state):
        return open_header(str(make.save(tmp_path / "a.safetensors", state)), dtype=None, fp8=False)

    assert opened({"nothing": torch.zeros(3, 4)}) is None, "ComfyUI knows no such model"
    assert opened(make.flux("bf16")) is not None
    monkeypatch.setattr(checkpoint, "OF_DIFFUSERS", make.DIFFUSERS)
    assert opened(make.flux("bf16")) is None, "diffusers' class runs it"
    (tmp_path / "b.safetensors").write_bytes(b"no header")
    assert open_header(str(tmp_path / "b.safetensors"), dtype=None, fp8=False) is None


@pytest.mark.parametrize("form", [None, "nvfp4"])
def test_a_run_equal_to_stock(form, pools):
    import folder_paths

    folder = folder_paths.get_folder_paths("diffusion_models")[-1]
    weights = make.quantised(make.weights(make.wan()), [form]) if form else plain(make.wan())
    path, case = make.save(f"{folder}/header.safetensors", weights), CASES["wan"]
    stock = comfy.sd.load_diffusion_model(str(path))
    lora, pool = block_lora(stock, "lora"), pools(1)
    expected, patched = case.run(stock), case.run(dressed(stock, lora))
    (ours,) = XDiTLoadDiffusionModel().load_unet("header.safetensors", "default")
    assert isinstance(ours, patchers.RemotePatcher) and type(ours.model) is type(stock.model)
    assert torch.equal(case.run(parallelize(ours, pool)), expected)
    assert torch.equal(case.run(parallelize(dressed(ours, lora), pool)), patched)
