"""A MODEL's file is named to the workers only if it has that MODEL's weights."""

import os
import shutil

import comfy.model_management
import comfy.sd
import native_models as make
import pytest
import safetensors.torch
import torch
from check_native_lora import LINEAR, dressed, some_loras
from check_native_sample import CASES
from comfy_xdit_nodes.native import same_weights, source
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.same_weights import why_not_of
from comfy_xdit_nodes.native.source import describe, source_of
from comfy_xdit_nodes.patcher import parallelize

from comfy_xdit.weights.stamp import stamp

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

DTYPES = (None, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def loaded(path, dtype=None):
    return comfy.sd.load_diffusion_model(str(path), {} if dtype is None else {"dtype": dtype})


def why_not(patcher):
    path = patcher.cached_patcher_init[1][0]
    reason = why_not_of(path, source_of(patcher.model.model_config), patcher)
    assert (describe(patcher) is None) == (reason is not None)
    return reason


@pytest.mark.parametrize("form", make.FLUX_FORMS)
def test_the_own_file(form, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux(form))
    patcher = loaded(path)
    assert describe(patcher).stamp == stamp(str(path))
    patched = dressed(patcher, *some_loras(patcher))
    comfy.model_management.load_models_gpu([patched])
    assert patched.backup, "ComfyUI has merged it into the weights"
    assert why_not(patcher) is None and why_not(patched) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_than_the_files(dtype, tmp_path):
    assert why_not(loaded(make.save(tmp_path / "flux.safetensors", make.flux("fp32")), dtype)) is None


@pytest.mark.parametrize("family", ["qwen", "wan"])
def test_other_families(family, tmp_path):
    weights = make.weights(getattr(make, family)())
    assert why_not(loaded(make.save(tmp_path / "a.safetensors", weights))) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("files"), {}

    def of(form):
        if form not in made:
            made[form] = make.save(folder / f"{form}.safetensors", make.flux(form))
        return made[form]

    return of


def written_over(path, change):
    """The file with other numbers, of the same size, in the same place."""
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(state)
    new = path.with_suffix(".new")
    safetensors.torch.save_file(state, new, metadata)
    assert new.stat().st_size == path.stat().st_size
    new.replace(path)


def another(key):
    """Changes each number of a weight by a bit."""

    def change(state):
        state[key] = state[key].clone()
        state[key].view(-1).view(torch.uint8).bitwise_xor_(1)

    return change


SCALES = {
    "scaled fp8": "scale_weight",
    "float8_e4m3fn": "weight_scale",
    "int8_tensorwise": "weight_scale",
    "nvfp4": "weight_scale_2",
    "mxfp8": "weight_scale",
    "mixed": "weight_scale",
}


def in_file(path, part, form):
    """The key of one of the file's weights."""
    names = {"a norm": "query_norm", "a matrix": "img_attn.qkv.weight", "a scale": f"qkv.{SCALES.get(form)}"}
    return next(key for key in safetensors.torch.load_file(path) if names[part] in key)


@pytest.mark.parametrize(
    ("part", "form"),
    [*((part, form) for part in ("a norm", "a matrix") for form in make.FLUX_FORMS), *(("a scale", x) for x in SCALES)],
)
def test_a_file_that_was_written_over(part, form, files, tmp_path):
    path = tmp_path / "flux.safetensors"
    shutil.copy(files(form), path)
    patcher = loaded(path)
    written_over(path, another(in_file(path, part, form)))
    assert why_not(patcher).endswith("is another one")
    assert why_not(loaded(path)) is None


def test_other_files_in_its_place(files, tmp_path):
    path = tmp_path / "flux.safetensors"

    def replaced_by(state, expected):
        make.save(path, make.flux("nvfp4"))
        patcher = loaded(path)
        make.save(path, state)
        assert expected in why_not(patcher)

    weights = make.flux("nvfp4")
    replaced_by(make.weights(make.wan()), "takes the file for")
    deeper = {key: value for key, value in weights.items() if "single_blocks.1" not in key}
    replaced_by(deeper, "reads other sizes")
    replaced_by(make.flux("mxfp8"), "is another one")
    lacking = dict(weights)
    del lacking["final_layer.linear.bias"]
    replaced_by(lacking, "it has no final_layer.linear.bias")
    make.save(path, weights)
    patcher = loaded(path)
    path.write_bytes(b"no safetensors")
    assert why_not(patcher) == "it is no whole safetensors file"
    path.unlink()
    assert describe(patcher) is None


def test_a_note_that_says_otherwise(files, tmp_path):
    path = tmp_path / "flux.safetensors"
    shutil.copy(files("int8_tensorwise"), path)
    patcher = loaded(path)
    key = "double_blocks.0.img_attn.qkv.comfy_quant"

    def change(state):
        text = bytes(state[key].tolist()).replace(b'"convrot_groupsize": 64', b'"convrot_groupsize": 16')
        state[key] = torch.tensor(list(text), dtype=torch.uint8)

    written_over(path, change)
    assert why_not(patcher) == f"{key} is another one"


def test_weights_changed_in_place(files):
    """As a node does that goes past ComfyUI's patches."""
    patcher = loaded(files("bf16"))
    net = patcher.model.diffusion_model
    small, large = net.img_in.bias, net.get_parameter(f"{LINEAR.removeprefix('diffusion_model.')}.weight")
    for weight in (small, large):
        kept = weight.clone()
        weight.mul_(1.01)
        assert why_not(patcher)
        weight.copy_(kept)
        assert why_not(patcher) is None
    small[-1] += 1
    assert why_not(patcher) == "img_in.bias is another one"
    small[-1] -= 1
    # What is known to escape: a few numbers of a large weight, between those that are looked at.
    large[5, 100:110] += 1
    assert why_not(patcher) is None
    large[5, 100:110] -= 1


class Wrapped(torch.Tensor):
    """As a node pack makes of weights, to compute with them in its own way."""


def test_weights_of_another_nodes_making(files):
    patcher = loaded(files("bf16"))
    layer = patcher.model.diffusion_model.img_in
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Wrapped), requires_grad=False)
    assert why_not(patcher) == "its img_in.weight is a Wrapped"


def test_a_merged_model_has_patches(files, tmp_path):
    import comfy_extras.nodes_model_merging as merging

    patcher = loaded(files("bf16"))
    other = loaded(make.save(tmp_path / "other.safetensors", make.weights(make.tiny.flux_config(), seed=99)))
    (merged,) = merging.ModelMergeSimple().merge(patcher, other, 0.3)
    comfy.model_management.load_models_gpu([merged])
    assert why_not(merged) is None and describe(merged).path == describe(patcher).path == str(files("bf16"))


def test_who_writes_meanwhile(files, tmp_path, monkeypatch):
    path = tmp_path / "flux.safetensors"
    shutil.copy(files("bf16"), path)
    patcher = loaded(path)

    def look(*args):
        found = why_not_of(*args)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(source, "why_not_of", look)
    assert describe(patcher) is None


def test_little_is_read(files, monkeypatch):
    """No more numbers are looked at than said, of the largest weights too."""
    seen = []

    def noted(in_file, loaded):
        seen.append(max(in_file.numel(), loaded.numel()))
        return True

    monkeypatch.setattr(same_weights, "_same_bytes", noted)
    patcher = loaded(files("bf16"))
    assert describe(patcher)
    assert max(seen) <= same_weights.SMALL
    sizes = [weight.numel() for weight in patcher.model.diffusion_model.parameters()]
    assert sum(seen) <= sum(min(size, same_weights.SMALL) for size in sizes) < sum(sizes) / 20


NEWER = (".ff.linear", ".ff_context.linear", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out")
NEWER += ("single_transformer_blocks.1.attn.to_out",)
"""Other spellings that diffusers has for the same weights."""


def test_a_file_in_diffusers_layout(tmp_path):
    """ComfyUI joins its weights: of those the names and shapes are compared, of the others the numbers."""
    import comfy.utils

    state, found = make.flux("bf16"), {}
    sizes = {"hidden_size": 256, "depth": 2, "depth_single_blocks": 2}
    for theirs, ours in comfy.utils.flux_to_diffusers(sizes).items():
        name, offset = (ours, None) if isinstance(ours, str) else ours[:2]
        function = None if isinstance(ours, str) or len(ours) < 3 else ours[2]
        if name in state and not any(newer in theirs for newer in NEWER):
            part = state[name] if offset is None else state[name].narrow(*offset)
            found[theirs] = function(part) if function else part
    patcher = loaded(make.save(tmp_path / "flux.safetensors", {key: value.clone() for key, value in found.items()}))
    assert why_not(patcher) is None
    patcher.model.diffusion_model.img_in.weight.mul_(1.01)
    assert why_not(patcher) == "img_in.weight is another one"


@pytest.mark.parametrize("dtype", ["default", "fp32", "fp16", "bf16"])
def test_another_compute_dtype(dtype, tmp_path, pools):
    """As the node sets it on a MODEL, in front of ours and behind it."""
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    model, case = loaded(make.save(tmp_path / "wan.safetensors", make.weights(make.wan()))), CASES["wan"]
    (other,) = ModelComputeDtype().patch(model, dtype)
    plain, expected = case.run(model), case.run(other)
    assert torch.equal(expected, plain) == (dtype in ("default", "fp32")), "what ComfyUI chooses"
    ours = parallelize(model, pools(1))
    assert torch.equal(case.run(parallelize(other, pools(1))), expected)
    assert torch.equal(case.run(ModelComputeDtype().patch(ours, dtype)[0]), expected)
    assert torch.equal(case.run(ours), plain)


def test_another_compute_dtype_of_a_quantised_model(tmp_path, pools):
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    weights = make.quantised(make.weights(make.wan()), ["nvfp4"])
    ours = parallelize(loaded(make.save(tmp_path / "wan.safetensors", weights)), pools(1))
    with pytest.raises(ValueError, match=r"compute in float16 with a quantised .*remove the node ModelComputeDtype"):
        CASES["wan"].run(ModelComputeDtype().patch(ours, "fp16")[0])
