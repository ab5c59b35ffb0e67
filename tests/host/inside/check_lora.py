"""LoRA and its kin through ComfyUI's own loading code, before and after our node: equal to stock."""

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.patches import encode_patches
from comfy_xdit_nodes.samplers import XDiTKSampler

TARGETS = {
    "sd3": "diffusion_model.joint_blocks.0.x_block.mlp.fc1",
    "flux": "diffusion_model.single_blocks.1.linear2",
    "pixart": "diffusion_model.blocks.1.cross_attn.kv_linear",
}


def random(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora_file(kind, name, out, inner):
    """A LoRA's state dict as trainers write it, on the weight `name`."""
    if kind in ("lora", "dora"):
        tensors = {"lora_up.weight": random(out, 4), "lora_down.weight": random(4, inner, seed=1)}
    elif kind == "loha":
        shapes = {"a": (out, 4), "b": (4, inner)}
        tensors = {f"hada_w{i}_{x}": random(*shapes[x], seed=i) for i in (1, 2) for x in "ab"}
    elif kind == "lokr":
        tensors = {"lokr_w1": random(4, 4), "lokr_w2": random(out // 4, inner // 4, seed=1)}
    elif kind == "glora":
        shapes = {"a1": (inner, 4), "a2": (4, inner), "b1": (out, 4), "b2": (4, inner)}
        tensors = {f"{x}.weight": random(*shape, seed=i) for i, (x, shape) in enumerate(shapes.items())}
    elif kind == "oft":
        tensors = {"oft_blocks": random(4, out // 4, out // 4)}
    elif kind == "boft":
        tensors = {"oft_blocks": random(2, 4, out // 4, out // 4)}
    elif kind == "diff":
        return {f"{name}.diff": random(out, inner)}
    elif kind == "set":
        return {f"{name}.set_weight": random(out, inner)}
    if kind == "dora":
        tensors["dora_scale"] = 1 + random(out, 1, seed=2).abs()
    return {f"{name}.{key}": value for key, value in tensors.items()} | {f"{name}.alpha": torch.tensor(2.0)}


def with_lora(patcher, kind, name, strength):
    weight = patcher.model.state_dict()[f"{name}.weight"]
    file = lora_file(kind, name, *weight.shape)
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "glora", "oft", "boft", "diff", "set"])
@pytest.mark.parametrize("model", TARGETS)
def test_each_kind(kind, model, models, fake):
    path, name = models / f"{model}.safetensors", TARGETS[model]
    stock = tiny.load(path)
    plain = tiny.sample(stock)
    patched = with_lora(stock, kind, name, -0.7)
    assert patched.patches, "ComfyUI knows this kind"
    expected = tiny.sample(patched)
    assert not torch.equal(expected, plain)

    source = from_checkpoint(open_checkpoint(str(path)))
    ours = with_lora(source, kind, name, -0.7)
    assert torch.equal(tiny.sample(ours), expected)
    assert torch.equal(tiny.sample(source), plain), "without it the base is back, bit for bit"
    assert torch.equal(tiny.sample(parallelize(with_lora(tiny.load(path), kind, name, -0.7))), expected)


def test_several_and_both_sides(models, fake):
    path, name = models / "flux.safetensors", TARGETS["flux"]

    def dressed(patcher, between=lambda patcher: patcher):
        patcher = between(with_lora(patcher, "lora", name, 0.5))
        return with_lora(with_lora(patcher, "lora", name, -1.5), "diff", TARGETS["flux"], 0.25)

    expected = tiny.sample(dressed(tiny.load(path)))
    assert torch.equal(tiny.sample(dressed(tiny.load(path), parallelize)), expected)


def test_a_switch_sends_patches_only(models, fake):
    source = from_checkpoint(open_checkpoint(str(models / "flux.safetensors")))
    tiny.sample(source)
    tiny.sample(with_lora(source, "lora", TARGETS["flux"], 0.5))
    fake.log.clear()
    tiny.sample(with_lora(source, "lora", TARGETS["flux"], 0.75))
    assert fake.log.count("SetPatches") == 1
    assert fake.log.count("Denoise") == 3 and len(fake.models) == 1


def test_model_merge_with_ours_first(models, fake):
    import comfy_extras.nodes_model_merging as merging

    path, other = models / "flux.safetensors", models / "merged.safetensors"
    tiny.write(other, tiny.flux_config(), seed=99)
    merge = merging.ModelMergeSimple().merge
    expected = tiny.sample(merge(tiny.load(path), tiny.load(other), 0.3)[0])
    ours = from_checkpoint(open_checkpoint(str(path)))
    assert torch.equal(tiny.sample(merge(ours, tiny.load(other), 0.3)[0]), expected)
    with pytest.raises(ValueError, match="in front of Parallel Model"):
        merge(tiny.load(other), ours, 0.3)


def test_offsets_and_functions():
    import comfy.utils

    weight = torch.ones(2, 2)
    patch = (1.0, (weight,), 1.0, (0, 4, 2), comfy.utils.swap_scale_shift)
    (encoded,) = encode_patches({"diffusion_model.a.weight": [patch]})
    assert (encoded.key, encoded.offset, encoded.function) == ("a.weight", [0, 4, 2], "swap_scale_shift")
    with pytest.raises(ValueError, match=r"weight function .*test_offsets.* to diffusion_model.a.weight"):
        encode_patches({"diffusion_model.a.weight": [(*patch[:4], lambda weight: weight)]})
    with pytest.raises(ValueError, match=r"kind 'model_as_lora' to diffusion_model.a.weight"):
        encode_patches({"diffusion_model.a.weight": [(1.0, ("model_as_lora", (weight,)), 1.0, None, None)]})


def test_what_workers_leave_out_is_said_as_stock_says_it(models, fake, caplog):
    name = TARGETS["flux"]
    change = fake.on_SetPatches
    fake.on_SetPatches = lambda message: change(message) | {"misfits": [[message.patches[0].key, "is too wide"]]}
    tiny.sample(with_lora(from_checkpoint(open_checkpoint(str(models / "flux.safetensors"))), "lora", name, 0.5))
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == [f"ERROR lora {name}.weight is too wide"]


def test_a_layer_that_does_not_fit_is_said_as_stock_says_it(models, pools, caplog):
    """It is left out, here as there, and ComfyUI's log has the line."""
    name = TARGETS["sd3"]
    path = models / "sd3.safetensors"
    wrong = lora_file("lora", name, 40, 24) | lora_file("lora", name.replace("blocks.0", "blocks.1"), 1024, 256)

    def dressed(patcher):
        return comfy.sd.load_lora_for_models(patcher, None, wrong, 1.0, 0)[0]

    expected = tiny.sample(dressed(tiny.load(path)))
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and said[0].startswith(f"ERROR lora {name}.weight ")
    caplog.clear()
    ours = tiny.sample(dressed(from_checkpoint(open_checkpoint(str(path)))), node=XDiTKSampler(), pool=pools(1))
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and said[0].startswith(f"ERROR lora {name}.weight ")
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
