"""The node classes: custom samplers and guiders, bad files, a platform without pools."""

import os
import subprocess
import sys
import textwrap

import comfy.samplers
import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import pytest
import safetensors.torch
import torch
from check_lora import TARGETS, with_lora
from comfy_xdit_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.loader import XDiTLoadDiffusionModel
from comfy_xdit_nodes.parallel_model import XDiTParallelModel
from comfy_xdit_nodes.parity import host
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint
from comfy_xdit_nodes.pool import PoolSetting, XDiTWorkerPool
from comfy_xdit_nodes.samplers import XDiTKSamplerAdvanced, XDiTSamplerCustomAdvanced

import nodes


class Noise:
    seed = 3

    def generate_noise(self, latent):
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


class Guiders:
    """Guiders of the stock nodes on a model."""

    def cfg(self, model):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(tiny.conditioning(), tiny.conditioning(seed=11))
        guider.set_cfg(2.5)
        return guider

    def basic(self, model):
        guider = custom.Guider_Basic(model)
        guider.set_conds(tiny.conditioning())
        return guider

    def dual(self, model):
        guider = custom.Guider_DualCFG(model)
        guider.set_conds(*(tiny.conditioning(seed=seed) for seed in (10, 11, 12)))
        guider.set_cfg(2.0, 3.0)
        return guider


def custom_inputs(guider):
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", 3)
    return {
        "noise": Noise(),
        "guider": guider,
        "sampler": sampler,
        "sigmas": sigmas,
        "latent_image": tiny.latent(),
    }


def stock_custom(inputs):
    stock = custom.SamplerCustomAdvanced
    return stock.execute(**inputs).result if hasattr(stock, "define_schema") else stock().sample(**inputs)


@pytest.mark.parametrize("kind", ["cfg", "basic", "dual"])
def test_custom_sampler(kind, models, fake):
    guider = getattr(Guiders(), kind)(tiny.load(models / "flux.safetensors"))
    inputs = custom_inputs(guider)
    patcher, options = guider.model_patcher, guider.model_options
    ours = XDiTSamplerCustomAdvanced().sample(**inputs)
    assert fake.log.count("Denoise") == 3
    assert guider.model_patcher is patcher and guider.model_options is options
    for mine, stock in zip(ours, stock_custom(inputs), strict=True):
        assert torch.equal(mine["samples"], stock["samples"])


def test_advanced_steps(models, fake):
    inputs = {
        **{"add_noise": "enable", "noise_seed": 3, "steps": 6, "cfg": 2.0, "sampler_name": "dpmpp_2m"},
        **{"scheduler": "beta", "positive": tiny.conditioning(), "negative": tiny.conditioning(seed=11)},
        **{"latent_image": tiny.latent(), "start_at_step": 1, "end_at_step": 4},
        "return_with_leftover_noise": "enable",
    }
    stock = tiny.load(models / "sd3.safetensors")
    (expected,) = nodes.KSamplerAdvanced().sample(model=stock, **inputs)
    (ours,) = XDiTKSamplerAdvanced().sample(model=stock, pool=PoolSetting(), **inputs)
    assert torch.equal(ours["samples"], expected["samples"])


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_loader_keeps_weights_as_the_stock_one(kind, dtype, models, fake):
    (ours,) = XDiTLoadDiffusionModel().load_unet(f"{kind}.safetensors", dtype)
    options = {"dtype": getattr(torch, f"float8_{dtype[4:]}")} if dtype != "default" else {}
    stock = tiny.load(models / f"{kind}.safetensors", options.get("dtype"))
    assert ours.model.get_dtype() == stock.model.get_dtype()
    assert ours.model.manual_cast_dtype == stock.model.manual_cast_dtype
    assert torch.equal(tiny.sample(ours), tiny.sample(stock))


def test_a_lora_of_another_model(models, fake, caplog):
    ours = from_checkpoint(open_checkpoint(str(models / "flux.safetensors")))
    file = {"lora_unet_nothing_of_ours.lora_up.weight": torch.ones(2, 2)}
    file["lora_unet_nothing_of_ours.lora_down.weight"] = torch.ones(2, 2)
    dressed = comfy.sd.load_lora_for_models(ours, None, file, 1.0, 0)[0]
    assert "lora key not loaded" in caplog.text
    assert torch.equal(tiny.sample(dressed), tiny.sample(ours))


def test_pool_node_and_parallel_model(models, fake):
    degrees = {"dp": 0, "cfg": 2, "pipe": 0, "ring": 0, "ulysses": 0, "tensor": 0}
    (setting,) = XDiTWorkerPool().make(devices="cpu:2", name=" mine ", **degrees)
    assert setting == PoolSetting(name="mine", devices="cpu:2", cfg=2)
    source = with_lora(tiny.load(models / "flux.safetensors"), "lora", TARGETS["flux"], 1.0)
    (model,) = XDiTParallelModel().parallelize(source, setting)
    assert model.setting == setting and model.clone().setting == setting
    assert XDiTParallelModel().parallelize(model)[0].setting == PoolSetting()
    assert model.patches.keys() == source.patches.keys() and model.patches_uuid == source.patches_uuid


BAD_FILES = {
    "truncated": (lambda good: good[: len(good) // 2], "cut off|damaged"),
    "hostile": (lambda good: (2**60).to_bytes(8, "little") + good[8:], "cut off|header"),
    "pickle": (lambda good: b"PK\x03\x04" + good[4:], "pickle"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind, models):
    change, sentence = BAD_FILES[kind]
    name = f"bad-{kind}.safetensors"
    (models / name).write_bytes(change((models / "sd3.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=sentence) as refused:
        XDiTLoadDiffusionModel().load_unet(name, "default")
    assert "\n" not in str(refused.value)
    (models / name).unlink()


def test_unknown_family(models):
    safetensors.torch.save_file({"input_blocks.0.0.weight": torch.zeros(4, 4)}, models / "sd1.safetensors")
    with pytest.raises(ValueError, match=r"Stable Diffusion 1.* supported are Flux\.1"):
        XDiTLoadDiffusionModel().load_unet("sd1.safetensors", "default")
    (models / "sd1.safetensors").unlink()


def test_every_node_has_a_name_and_a_page():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name in NODE_CLASS_MAPPINGS:
        assert (host.ROOT / "web" / "docs" / f"{name}.md").is_file()


def test_where_no_pool_can_be_nodes_are_listed_and_say_what_is_needed(tmp_path, models):
    """As on Windows: torch without torch.distributed, Python without fcntl."""
    script = f"""
        import runpy, sys
        import torch
        import torch.distributed
        sys.modules["fcntl"] = None
        torch.distributed.is_available = lambda: False
        enter = runpy.run_path({str(host.ROOT / "nodes" / "parity" / "host.py")!r})["enter"]
        enter({os.environ["COMFYUI_UNDER_TEST"]!r}, {str(tmp_path / "comfyui")!r})
        pack = runpy.run_path({str(host.ROOT / "__init__.py")!r})
        assert len(pack["NODE_CLASS_MAPPINGS"]) >= 8
        from comfy_xdit_nodes.checkpoint import open_checkpoint
        from comfy_xdit_nodes.parity import models
        from comfy_xdit_nodes.patcher import from_checkpoint
        model = from_checkpoint(open_checkpoint({str(models / "sd3.safetensors")!r}))
        try:
            models.sample(model)
        except Exception as error:
            print("SAID", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    said = [line for line in ended.stdout.splitlines() if line.startswith("SAID")]
    assert said and "Linux" in said[0] and "WSL2" in said[0], ended.stdout + ended.stderr[-3000:]
