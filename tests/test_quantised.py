"""Quantised files are refused by what they say of themselves: the format, and the layers in it."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from comfy_xdit.models import detect
from comfy_xdit.weights.header import read_header, read_metadata
from comfy_xdit.weights.quantised import layer_formats

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1")


def described(**description):
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def write(path, prefix="", *, beside=None, metadata=None, dtype=torch.int8):
    """A Flux whose LAYERS are of `dtype`; beside: ending → tensor, for each of them."""
    tensors = {prefix + key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in tiny.flux_shapes().items()}
    for layer in LAYERS:
        tensors[f"{prefix}{layer}.weight"] = tensors[f"{prefix}{layer}.weight"].to(dtype)
        tensors |= {f"{prefix}{layer}.{ending}": tensor.clone() for ending, tensor in (beside or {}).items()}
    save_file(tensors, path, metadata=metadata)
    return str(path)


def refusal(path):
    infos = read_header(path)
    with pytest.raises(ValueError) as refused:
        detect(infos, layer_formats(path, infos))
    assert "\n" not in str(refused.value) and "plain fp8" in str(refused.value)
    return str(refused.value)


FORMATS = {
    "asym_w4a8_int8": ({"format": "asym_w4a8_int8"}, torch.int8),
    "int8_convrot": ({"format": "int8_convrot"}, torch.int8),
    "int8_tensorwise with convrot": ({"format": "int8_tensorwise", "convrot": True}, torch.int8),
    "float8_e4m3fn": ({"format": "float8_e4m3fn"}, torch.float8_e4m3fn),
    "nvfp4": ({"format": "nvfp4"}, torch.uint8),
    "an unknown format": ({}, torch.int8),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_named_as_the_file_names_it(name, prefix, tmp_path):
    description, dtype = FORMATS[name]
    # The same scales that scaled fp8 files have.
    beside = {"weight_scale": torch.ones(1), "comfy_quant": described(**description)}
    says = refusal(write(tmp_path / "a.safetensors", prefix, beside=beside, dtype=dtype))
    assert says.startswith(f"this Flux.1 checkpoint has {prefix}{LAYERS[0]} and 2 other layers in {name};")


def test_metadata_says_it_too(tmp_path):
    layers = {LAYERS[0]: {"format": "int8_convrot"}, LAYERS[1]: {"format": "nvfp4"}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    path = write(tmp_path / "a.safetensors", beside={"weight_scale": torch.ones(1)}, metadata=metadata)
    assert f"has {LAYERS[0]} in int8_convrot, {LAYERS[1]} in nvfp4;" in refusal(path)
    assert read_metadata(path) == metadata


@pytest.mark.parametrize(
    ("beside", "dtype", "says"),
    [
        ({"scale_weight": torch.ones(1)}, torch.float8_e4m3fn, "is in scaled fp8"),
        ({"weight_scale": torch.ones(1)}, torch.int8, f"has {LAYERS[0]}.weight and 2 other weights as I8"),
        ({"weight.absmax": torch.ones(1)}, torch.uint8, "is in bitsandbytes"),
    ],
)
def test_files_that_say_nothing_go_by_their_tensors(beside, dtype, says, tmp_path):
    assert says in refusal(write(tmp_path / "a.safetensors", beside=beside, dtype=dtype))


@pytest.mark.parametrize("text", ["{", "[1]", '{"layers": 3}', "[" * 100_000, '{"layers": {"a": 7}}'])
def test_hostile_descriptions(text, tmp_path):
    path = write(tmp_path / "a.safetensors", metadata={"_quantization_metadata": text}, dtype=torch.bfloat16)
    infos = read_header(path)
    assert set(layer_formats(path, infos)) <= {"a"}


def test_a_quantised_text_encoder_beside_is_none_of_ours(tmp_path):
    path = write(tmp_path / "a.safetensors", "model.diffusion_model.", dtype=torch.bfloat16)
    infos = read_header(path)
    formats = {"text_encoders.t5xxl.layer": "float8_e4m3fn"}
    assert detect(infos, formats)[1] == "model.diffusion_model."
