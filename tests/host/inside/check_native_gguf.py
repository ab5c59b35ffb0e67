"""MODELs of ComfyUI-GGUF's loader on the pool: one rank is equal to the pack's own run, to the bit."""

import dataclasses
import logging
import shutil

import gguf_files
import native_models as make
import pytest
import torch
from check_native_lora import block_lora, dressed
from check_native_sample import Case, random
from comfy_xdit_nodes.native.gguf import describe
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.parity.models import CONTEXT, POOLED
from comfy_xdit_nodes.patcher import parallelize

from comfy_xdit.errors import InputError

log = logging.getLogger("comfy_xdit")

pytestmark = [
    pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes"),
    pytest.mark.skipif(gguf_files.folder() is None, reason="no ComfyUI-GGUF here; COMFYUI_GGUF names its folder"),
]

MODES = {
    "1 rank": (1, {}),
    "ulysses=2": (2, {"ulysses": 2}),
    "cfg=2": (2, {"cfg": 2}),
    "dp=2": (2, {"dp": 2}),
    "pipe=2": (2, {"pipe": 2, "warmup_steps": 10_000}),
}
LIMIT = 1e-5
MIXED = ("Q8_0", "Q4_0", "Q5_1", "BF16", "F16")

CASES = {
    "WAN21_T2V": Case(make.wan, (2, 16, 3, 10, 12), 4096),
    "Flux": Case(make.tiny.flux_config, (1, 16, 16, 12), CONTEXT, pooled_output=random(1, POOLED, seed=4)),
    "QwenImage": Case(make.qwen, (1, 16, 1, 10, 12), 3584),
}


def file(kind, forms, name="model.gguf"):
    return gguf_files.write(name, kind, make.weights(CASES[kind].weights(), torch.float32), forms)


def difference(ours, expected):
    assert expected.isfinite().all() and expected.std() > 0
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def wan():
    """The file of a model in several formats, and what the pack's MODEL makes."""
    with torch.inference_mode():
        path = file("WAN21_T2V", MIXED, "wan.gguf")
        return path, CASES["WAN21_T2V"].run(gguf_files.load(path))


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_the_packs_own_run(mode, wan, pools):
    path, expected = wan
    num_ranks, degrees = MODES[mode]
    ours = CASES["WAN21_T2V"].run(parallelize(gguf_files.load(path), pools(num_ranks, **degrees)))
    error = difference(ours, expected)
    log.info("GGUF %s: %.1e", mode, error)
    assert error == 0 if num_ranks == 1 else error <= LIMIT


@pytest.mark.parametrize(("kind", "form"), [("Flux", form) for form in MIXED] + [("QwenImage", "Q8_0")])
def test_formats(kind, form, pools):
    path, case = file(kind, [form]), CASES[kind]
    expected = case.run(gguf_files.load(path))
    assert torch.equal(case.run(parallelize(gguf_files.load(path), pools(1))), expected)


@pytest.mark.parametrize("choices", [{"dequant_dtype": "bfloat16"}, {"patch_dtype": "float16"}])
def test_what_the_loader_was_asked_for(choices, wan, pools):
    """It shows: in the matrices, and in what a LoRA makes of them."""
    path, plain = wan
    case = CASES["WAN21_T2V"]
    model = gguf_files.load(path, **choices)
    lora = block_lora(model, "lora")
    expected = case.run(model), case.run(dressed(model, lora))
    ours = parallelize(model, pools(1))
    gguf_files.load(path)
    assert torch.equal(case.run(ours), expected[0]) and torch.equal(case.run(dressed(ours, lora)), expected[1])
    assert torch.equal(expected[0], plain) == ("patch_dtype" in choices)
    assert not torch.equal(expected[1], case.run(dressed(gguf_files.load(path), lora)))


@pytest.mark.parametrize("mode", ["1 rank", "ulysses=2", "pipe=2"])
def test_lora(mode, wan, pools):
    """On, another one, and off again."""
    path, plain = wan
    case, (num_ranks, degrees) = CASES["WAN21_T2V"], MODES[mode]
    model = gguf_files.load(path)
    loras = block_lora(model, "lora"), block_lora(model, "lokr")
    ours = parallelize(gguf_files.load(path), pools(num_ranks, **degrees))
    for lora in loras:
        expected = case.run(dressed(model, lora))
        assert not torch.equal(expected, plain)
        error = difference(case.run(dressed(ours, lora)), expected)
        log.info("GGUF with LoRA, %s: %.1e", mode, error)
        assert error == 0 if num_ranks == 1 else error <= LIMIT
    assert difference(case.run(ours), plain) <= (0 if num_ranks == 1 else LIMIT)


def test_tensor_is_refused(wan, pools):
    with pytest.raises(ValueError, match="tensor"):
        CASES["WAN21_T2V"].run(parallelize(gguf_files.load(wan[0]), pools(2, tensor=2)))


def test_a_file_that_is_no_longer_the_models(wan):
    path = shutil.copy(wan[0], wan[0].with_name("other.gguf"))
    model = gguf_files.load(path)
    assert describe(model).path == str(path)
    norm = next(p for name, p in model.model.diffusion_model.named_parameters() if "norm" in name)
    norm[0] += 1
    with pytest.raises(ValueError, match=r"can't load other\.gguf for its MODEL: .* is another one; load it anew"):
        describe(model)
    path.unlink()
    with pytest.raises(ValueError, match="its GGUF file is gone, or ComfyUI has copied the weights"):
        describe(model)


def test_weights_that_were_copied(wan):
    model = gguf_files.load(wan[0])
    for layer in model.model.diffusion_model.modules():
        if getattr(getattr(layer, "weight", None), "tensor_type", None) is not None:
            # A move to a device and back.
            layer.weight.data = layer.weight.data.as_subclass(torch.Tensor).clone()
    with pytest.raises(ValueError, match="ComfyUI has copied the weights"):
        describe(model)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("folder", "/nowhere", "no ComfyUI-GGUF in the folder"),
        ("package", "0.0.0", r"package gguf .*, this ComfyUI 0\.0\.0"),
        ("sources", "0", "with other sources"),
    ],
)
def test_another_pack_is_refused_by_name(field, value, sentence, wan):
    from comfy_xdit.native.gguf import GGUF

    told = describe(gguf_files.load(wan[0])).source.gguf
    assert GGUF(told).read(str(wan[0]))
    with pytest.raises(InputError, match=sentence):
        GGUF(dataclasses.replace(told, **{field: value}))


def test_a_damaged_file_is_refused(wan, tmp_path):
    from comfy_xdit.native.gguf import GGUF

    pack = GGUF(describe(gguf_files.load(wan[0])).source.gguf)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + wan[0].read_bytes()[4:200])
    for text in (b"none", (tmp_path / "a.gguf").read_bytes()):
        (tmp_path / "b.gguf").write_bytes(text)
        with pytest.raises(InputError, match="ComfyUI-GGUF can't read it"):
            pack.read(str(tmp_path / "b.gguf"))
