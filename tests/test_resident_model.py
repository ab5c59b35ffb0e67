"""A resident model: its numbers, where its weights lie, and patches that come and go."""

import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from comfy_xdit.messages import LoadModel, Patch, SetPatches
from comfy_xdit.models import FAMILIES
from comfy_xdit.models.resident import CastLinear, ResidentModel, load
from comfy_xdit.weights.patches import apply_patches
from comfy_xdit.weights.slices import slice_map

KINDS = {
    "flux": ("flux", tiny.flux_shapes()),
    "schnell": ("flux", tiny.flux_shapes(guidance=False)),
    "sd3": ("sd3", tiny.sd3_shapes(qk_norm=False, dual=())),
    "sd35": ("sd3", tiny.sd3_shapes()),
    "pixart": ("pixart", tiny.pixart_shapes()),
    "alpha": ("pixart", tiny.pixart_shapes(alpha=True, null_tokens=None)),
}
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def message(path, family, storage="float32", compute="float32", prefix=""):
    return LoadModel(
        model="m", path=str(path), prefix=prefix, family=family, storage_dtype=storage, compute_dtype=compute
    )


def make(tmp_path, kind="flux", dtype="float32", storage=None, compute="float32"):
    family, shapes = KINDS[kind]
    weights = tiny.random_weights(shapes, dtype=getattr(torch, dtype))
    path = tiny.write(tmp_path / f"{kind}-{dtype}.safetensors", weights)
    return load(message(path, family, storage or dtype, compute), "cpu"), weights


@torch.no_grad()
def run(model, seed=3):
    """One evaluation by the diffusers module itself."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=generator).to(model.compute_dtype)

    inputs = {"encoder_hidden_states": rand(2, 5, 24)}
    time = torch.rand(2, generator=generator)
    if model.family.name == "pixart":
        inputs |= {"hidden_states": rand(2, 4, 64, 4), "timestep": time * 1000}
        inputs["added_cond_kwargs"] = {"resolution": 500 + rand(2, 2), "aspect_ratio": rand(2, 1)}
        return model.module(**inputs, return_dict=False)[0]
    inputs["pooled_projections"] = rand(2, 20)
    if model.family.name == "flux":
        ids = torch.randint(0, 9, (12, 3), generator=generator).float()
        inputs |= {
            "hidden_states": rand(2, 12, 16),
            "timestep": time,
            "img_ids": ids,
            "txt_ids": torch.zeros(5, 3),
        }
        inputs |= {"guidance": 3 * time} if model.config["guidance_embeds"] else {}
    else:
        inputs |= {"hidden_states": rand(2, 4, 8, 10), "timestep": time * 1000}
    return model.module(**inputs, return_dict=False)[0]


def lora(key, shape, strength=1.0, **more):
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    columns = shape[1:].numel()
    up, down = torch.randn(shape[0], 3, generator=generator), torch.randn(3, columns, generator=generator)
    return Patch(key=key, kind="lora", weights=[up, 0.2 * down, 2.0, None, None, None], strength=strength, **more)


def wear(model, patches, name="p"):
    return model.set_patches(SetPatches(model="m", patches_id=name, patches=patches))


def everything(model):
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def places(model):
    return {key: value.data_ptr() for key, value in model.module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_forward_equals_diffusers_own_conversion(tmp_path, kind):
    model, weights = make(tmp_path, kind)
    other = model.family.model_class()(**model.config).eval()
    other.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(weights)))
    expected, got = run(model), run(type("Plain", (), {**vars(model), "module": other}))
    assert expected.isfinite().all() and expected.std() > 0.1
    assert torch.equal(expected, got)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_layout(tmp_path, kind):
    """The same numbers, the same patches, whatever layout the file has."""
    model, weights = make(tmp_path, kind)
    save_file({key: value.contiguous() for key, value in everything(model).items()}, str(tmp_path / "d"))
    other = load(message(tmp_path / "d", model.family.name), "cpu")
    assert other.config == model.config and torch.equal(run(other), run(model))
    assert other.bytes_held()["private"] == 0
    patches = [lora(key, value.shape) for key, value in weights.items() if key.endswith("weight")]
    for resident in (model, other):
        assert wear(resident, patches) == len(patches)
    assert same(everything(model), everything(other))
    wear(other, [], "none")
    assert other.bytes_held()["private"] == 0


@pytest.mark.parametrize("kind", ["flux", "sd35", "alpha"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_an_all_in_one_file(tmp_path, kind, dtype):
    alone, weights = make(tmp_path, kind, dtype, compute="float32")
    path = tiny.all_in_one(tmp_path / "all.safetensors", weights)
    prefixed = message(path, alone.family.name, dtype, "float32", "model.diffusion_model.")
    inside = load(prefixed, "cpu")
    assert torch.equal(run(inside), run(alone))
    assert run(alone).std() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["flux", "sd35", "alpha"])
def test_cast_at_use_equals_weights_cast_before(tmp_path, kind, dtype):
    model, weights = make(tmp_path, kind, dtype, compute="float32")
    path = tiny.write(tmp_path / "wide.safetensors", {key: value.float() for key, value in weights.items()})
    wide = load(message(path, model.family.name), "cpu")
    assert torch.equal(run(model), run(wide))
    is_cast = [isinstance(part, CastLinear) for part in model.module.modules() if hasattr(part, "in_features")]
    assert is_cast and all(is_cast) == any(is_cast) == (dtype != "float32")


def test_narrower_storage_than_the_file(tmp_path):
    """weight_dtype fp8 on a wider file: every number is rounded once, biases and norms too."""
    narrow, weights = make(tmp_path, "flux", "float32", storage="float8_e4m3fn")
    rounded = {key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}
    path = tiny.write(tmp_path / "fp8.safetensors", rounded)
    assert torch.equal(run(narrow), run(load(message(path, "flux", "float8_e4m3fn"), "cpu")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["flux", "sd35", "alpha"])
def test_weights_stay_in_the_map(tmp_path, kind, dtype):
    compute = dtype if "8" not in dtype else "bfloat16"
    model, weights = make(tmp_path, kind, dtype, compute=compute)
    held = model.bytes_held()
    swapped = {"norm_out.linear", f"transformer_blocks.{model.config['num_layers'] - 1}.norm1_context.linear"}
    large = [
        value
        for key, value in model.module.named_parameters()
        if key.endswith(".weight") and value.dim() == 2 and key.removesuffix(".weight") not in swapped
    ]
    assert held["mapped"] >= sum(value.nbytes for value in large) > 0
    assert held["private"] < sum(value.nbytes for value in weights.values()) / 6
    twin = load(message(model._file.path, model.family.name, dtype, compute), "cpu")
    assert twin.bytes_held() == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["flux", "sd35", "alpha"])
def test_patched_weights_are_those_of_a_patched_file(tmp_path, kind, dtype):
    """Patching equals merging into the checkpoint; fp8 weights are left in the compute dtype."""
    model, weights = make(tmp_path, kind, dtype, compute="bfloat16" if dtype != "float32" else "float32")
    keys = [key for key in weights if key.endswith("weight")]
    patches = [lora(key, weights[key].shape, 0.1) for key in keys] + [
        Patch(key=key, kind="diff", weights=[torch.ones(weights[key].shape)], strength=0.25)
        for key in weights
        if key.endswith("bias")
    ]
    assert wear(model, patches) == len(patches)
    exact = torch.bfloat16 if "8" in dtype else getattr(torch, dtype)
    merged = {patch.key: apply_patches(weights[patch.key].float(), [patch]).to(exact) for patch in patches}
    slices = slice_map(model.family.table(weights), weights)
    state = model.module.state_dict()
    for target, pieces in slices.items():
        if pieces[0].source in merged:
            expected = torch.cat([merged[piece.source].narrow(0, *piece[1:3]) for piece in pieces])
            assert torch.equal(state[target], expected.to(state[target].dtype)), target
            assert state[target].dtype == exact or state[target].dim() == 1
    assert run(model).isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_taking_patches_off_restores_the_views(tmp_path, dtype):
    model, weights = make(tmp_path, "flux", dtype, compute="float32")
    before, at, held, out = everything(model), places(model), model.bytes_held(), run(model)
    kinds = (
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.1.linear1.weight",
        "final_layer.linear.weight",
    )
    for round_trip in range(3):
        assert wear(model, [lora(key, weights[key].shape) for key in kinds], f"on {round_trip}") == 3
        assert not torch.equal(run(model), out)
        assert model.bytes_held()["private"] > held["private"]
        assert model.bytes_held()["mapped"] < held["mapped"]
        assert wear(model, [], "off") == 3
        assert same(everything(model), before) and torch.equal(run(model), out)
        assert model.bytes_held() == held
    changed = {key for key, place in places(model).items() if place != at[key]}
    assert not any(key.endswith(".weight") and before[key].dim() == 2 for key in changed)


def test_only_named_layers_are_touched(tmp_path):
    model, weights = make(tmp_path)
    key, other = "double_blocks.1.txt_attn.qkv.weight", "single_blocks.0.linear2.weight"
    at, before = places(model), everything(model)
    assert wear(model, [lora(key, weights[key].shape)], "a") == 1
    moved = {name for name, place in places(model).items() if place != at[name]}
    assert moved == {f"transformer_blocks.1.attn.add_{x}_proj.weight" for x in "qkv"}
    assert wear(model, [lora(key, weights[key].shape)], "a") == 0
    first = everything(model)
    assert wear(model, [lora(key, weights[key].shape, -0.5)], "b") == 1
    assert not same(everything(model), first)
    assert wear(model, [lora(other, weights[other].shape)], "c") == 2
    assert all(torch.equal(model.module.state_dict()[name], before[name]) for name in moved)
    assert wear(model, [lora(key, weights[key].shape)], "a") == 2
    assert same(everything(model), first)


def test_offsets_into_fused_weights(tmp_path):
    model, _ = make(tmp_path)
    key, rows = "single_blocks.0.linear1.weight", 32
    before = everything(model)
    part = lora(key, torch.Size((rows, rows)), offset=[0, rows, rows])
    assert wear(model, [part]) == 1
    now = model.module.state_dict()
    change = part.weights[0] @ part.weights[1] * (2.0 / 3)
    block = "single_transformer_blocks.0."
    expected = before[block + "attn.to_k.weight"] + change
    assert torch.allclose(now[block + "attn.to_k.weight"], expected, atol=1e-6)
    for name in ("attn.to_q.weight", "attn.to_v.weight", "proj_mlp.weight"):
        assert torch.equal(now[block + name], before[block + name])


def test_buffers_are_not_patched(tmp_path):
    """As in ComfyUI, which patches parameters only."""
    model, weights = make(tmp_path, "sd3")
    table = Patch(key="pos_embed", kind="set", weights=[torch.zeros(weights["pos_embed"].shape)], strength=1.0)
    before = everything(model)
    assert wear(model, [table]) == 0 and same(everything(model), before)


def test_what_comfyui_leaves_alone_is_not_patched(tmp_path):
    """Tables of shifts and scales, and a weight that no model uses; whether the file has it or not."""
    for kind in ("pixart", "alpha"):
        model, weights = make(tmp_path, kind)
        before = everything(model)
        tables = ("blocks.1.scale_shift_table", "final_layer.scale_shift_table", "y_embedder.y_embedding")
        patches = [Patch(key=key, kind="set", weights=[torch.zeros(2, 2)], strength=1.0) for key in tables]
        assert wear(model, patches) == 0 and same(everything(model), before)
        assert wear(model, [*patches, lora("t_block.1.weight", weights["t_block.1.weight"].shape)], "two") == 1


def test_the_empty_name_stands_for_none(tmp_path):
    model, weights = make(tmp_path)
    patch = lora("txt_in.weight", weights["txt_in.weight"].shape)
    with pytest.raises(ValueError, match="patches need a patches_id"):
        wear(model, [patch], "")
    assert wear(model, [patch]) == 1 and model.num_patched == 1
    assert wear(model, [], "") == 1 and model.num_patched == 0


def test_both_spellings_of_a_norm(tmp_path):
    model, _ = make(tmp_path)
    for ending in ("scale", "weight"):
        key = f"double_blocks.0.img_attn.norm.query_norm.{ending}"
        wear(model, [Patch(key=key, kind="set", weights=[torch.full((16,), 2.0)], strength=1.0)], ending)
        assert torch.equal(model.module.state_dict()["transformer_blocks.0.attn.norm_q.weight"], torch.full((16,), 2.0))


def test_a_patch_that_widens_a_layer(tmp_path):
    model, _ = make(tmp_path, "schnell")
    wide = lora("img_in.weight", torch.Size((32, 32)))
    wide.weights[5] = [32, 32]
    wear(model, [wide])
    assert model.module.x_embedder.weight.shape == (32, 32)
    wear(model, [], "off")
    assert model.module.x_embedder.weight.shape == (32, 16)
    wide.weights[5], wide.weights[0] = [64, 32], torch.zeros(64, 3)
    with pytest.raises(ValueError, match=r"makes img_in\.weight 64 rows high instead of 32"):
        wear(model, [wide])


def test_errors_leave_the_base(tmp_path):
    model, weights = make(tmp_path)
    before = everything(model)
    key = "txt_in.weight"
    good = lora(key, weights[key].shape)
    with pytest.raises(ValueError, match=r"a patch for blocks\.7\.weight, a weight that Flux\.1 hasn't got"):
        wear(model, [good, lora("blocks.7.weight", torch.Size((4, 4)))])
    assert same(everything(model), before)
    wear(model, [good], "good")
    with pytest.raises(ValueError, match="unknown kind of patch 'zip'"):
        wear(model, [good, Patch(key="img_in.weight", kind="zip", weights=[], strength=1.0)], "bad")
    assert same(everything(model), before) and model.patches_id == ""


def test_a_model_that_cannot_be_restored_passes_for_none(tmp_path, monkeypatch):
    model, weights = make(tmp_path)
    before = everything(model)
    keys = ["img_in.weight", "txt_in.weight"]
    patches = [lora(key, weights[key].shape) for key in keys]

    def no_memory(self, source, *rest):
        if source == keys[1] or not rest:
            raise MemoryError
        return patch(self, source, *rest)

    patch = ResidentModel._patch
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(ResidentModel, "_patch", no_memory)
        broken.setattr(ResidentModel, "_restore", no_memory)
        wear(model, patches)
    # Half of it is on, and no job may take that for the model without.
    assert model.num_patched and model.patches_id not in ("", "on")
    wear(model, [], "")
    assert same(everything(model), before) and model.patches_id == "" and not model.num_patched


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "wan"}, "unknown family 'wan'; known are flux, sd3, pixart"),
        (
            {"family": "sd3"},
            "model.safetensors: this is no SD3 / SD3.5 checkpoint: it has no pos_embed",
        ),
        ({"prefix": "model."}, "it has no img_in.weight"),
        ({"storage_dtype": "int4"}, "dtype 'int4' is not one of float64, float32"),
        ({"compute_dtype": "float8_e5m2"}, "too coarse"),
    ],
)
def test_messages_that_can_not_be_met(tmp_path, change, says):
    path = tiny.write(tmp_path / "model.safetensors", tiny.random_weights(tiny.flux_shapes()))
    wanted = message(path, "flux")
    with pytest.raises(ValueError) as caught:
        load(type(wanted)(**{**vars(wanted), **change}), "cpu")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("final_layer.linear.bias"), "the weights that make proj_out.bias are missing"),
        (
            lambda w: w.pop("single_blocks.0.linear2.weight"),
            "make single_transformer_blocks.0.proj_out.weight are",
        ),
        (
            lambda w: w.update({"adapter.weight": torch.zeros(2, 2)}),
            "no place in this model (first: adapter.weight)",
        ),
        (lambda w: w.update({"img_in.bias": torch.zeros(7)}), "img_in.bias makes x_embedder.bias (7,), but"),
        (
            lambda w: w.update({"txt_in.weight": torch.zeros(32, 24, dtype=torch.uint8)}),
            "txt_in.weight is kept as U8",
        ),
        (
            lambda w: w.update({"time_in.out_layer.weight": torch.zeros(32, 16)}),
            "but the model wants (32, 32)",
        ),
    ],
)
def test_checkpoints_that_are_not_whole(tmp_path, change, says):
    weights = tiny.random_weights(tiny.flux_shapes())
    change(weights)
    path = tiny.write(tmp_path / "broken.safetensors", weights)
    with pytest.raises(ValueError) as caught:
        load(message(path, "flux"), "cpu")
    assert str(caught.value).startswith("broken.safetensors: ") and says in str(caught.value)


def test_families_are_known_by_their_names():
    assert all(name == family.name for name, family in FAMILIES.items())
