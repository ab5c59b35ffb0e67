"""Tensor parallel: every rank reads its shards only, and N ranks equal one, bare and with patches on."""

import dataclasses

import pytest
import test_resident_model as resident
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks, run_resident

from comfy_xdit.messages import LoadModel, Patch, SetPatches
from comfy_xdit.models import FAMILIES
from comfy_xdit.models.resident import load
from comfy_xdit.parallel.paths import find
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.tensor import Region
from comfy_xdit.weights.parts import divisible, part_of
from comfy_xdit.weights.patches import apply_patches

LIMIT = 1e-5
HEADS = 4
KINDS = {
    "flux": ("flux", tiny.flux_shapes(heads=HEADS, context=12, vec=10)),
    "sd3.5": ("sd3", tiny.sd3_shapes(heads=HEADS, context=12, vec=10)),
    "pixart": ("pixart", tiny.pixart_shapes(heads=HEADS, context=12, alpha=True)),
}
PATCHED = {
    "flux": (
        "double_blocks.0.img_attn.qkv",
        "single_blocks.0.linear2",
        "double_blocks.0.txt_mlp.0",
        "double_blocks.1.img_mlp.2",
    ),
    "sd3.5": (
        "joint_blocks.0.x_block.attn2.qkv",
        "joint_blocks.0.context_block.attn.proj",
        "joint_blocks.0.x_block.mlp.fc1",
        "joint_blocks.1.x_block.mlp.fc2",
    ),
    "pixart": (
        "blocks.0.cross_attn.kv_linear",
        "blocks.0.cross_attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc2",
    ),
}
DEGREES = {
    2: [{"tensor": 2}],
    4: [
        {"tensor": 4},
        {"tensor": 2, "ulysses": 2},
        {"tensor": 2, "ring": 2},
        {"tensor": 2, "cfg": 2},
        {"tensor": 2, "dp": 2},
    ],
}


@pytest.fixture(scope="module", params=sorted(DEGREES))
def ranks(request):
    with Ranks(request.param) as started:
        yield started


def checkpoint(tmp_path, kind, dtype="float32", **changes) -> tuple[LoadModel, dict]:
    family, shapes = KINDS[kind]
    weights = tiny.random_weights(shapes, dtype=getattr(torch, dtype))
    path = tiny.write(tmp_path / f"{kind}.safetensors", weights)
    message = resident.message(path, family, storage=dtype)
    return dataclasses.replace(message, **changes), weights


def call_of(family, batch=2, size=(6, 7), text=5):
    from ranks import tiny_call

    return tiny_call(family, seed=0, batch=batch, size=size, text=text)


def patches_of(kind: str, weights: dict) -> list[Patch]:
    """Patches of every kind, on weights cut by rows and by columns, whole ones and parts of fused ones."""
    fused, out, up, down = PATCHED[kind]

    def size(name):
        return weights[f"{name}.weight"].shape

    def random(*shape):
        return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    hidden = size(fused)[1]
    part = resident.lora(f"{fused}.weight", torch.Size((hidden, hidden)), 0.3, offset=[0, hidden, hidden])
    scaled = resident.lora(f"{down}.weight", size(down), 0.2, strength_model=0.9)
    dora = resident.lora(f"{out}.weight", size(out), 0.3)
    dora.weights[4] = 1 + random(size(out)[0], 1).abs()
    rows, columns = size(up)
    loha = [random(rows, 2), random(2, columns), 2.0, random(rows, 2), random(2, columns), None, None, None]
    lokr = [random(4, 4), None, None, None, None, random(rows // 4, 3), random(3, columns // 4), None, None]
    return [
        *(resident.lora(f"{name}.weight", size(name), 0.3) for name in (fused, out, up, down)),
        part,
        scaled,
        dora,
        Patch(key=f"{up}.weight", kind="loha", weights=loha, strength=2.0),
        Patch(key=f"{fused}.weight", kind="diff", weights=[random(*size(fused))], strength=0.5),
        Patch(key=f"{out}.bias", kind="diff", weights=[random(size(out)[0])], strength=1.0),
        Patch(key=f"{up}.bias", kind="set", weights=[random(size(up)[0])], strength=1.0),
        Patch(key=f"{up}.weight", kind="lokr", weights=lokr, strength=1.0),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_one(ranks, tmp_path, kind) -> None:
    message, weights = checkpoint(tmp_path, kind)
    patches = patches_of(kind, weights)
    call = call_of(message.family)
    expected = run_resident(message, patches, [call], [2], {})["outputs"]
    assert (expected[1][0] - expected[0][0]).abs().max() > 0.01
    assert torch.equal(expected[0][0], expected[2][0])
    for degrees in DEGREES[ranks.num_ranks]:
        answers = ranks.run(
            "run_resident", load=message, patches=patches, calls=[call], chunks=[2], degrees=degrees
        )
        bare, dressed, again = answers[0]["outputs"]
        for (out,), (want,) in zip((bare, dressed), expected, strict=False):
            assert (out - want).abs().max() <= LIMIT * want.abs().max(), degrees
        assert torch.equal(again[0], bare[0])
        assert all(answer["bytes off"] == answer["bytes"] for answer in answers)


def test_few_tokens(ranks, tmp_path) -> None:
    """One token of text and image: ranks without any still add up with the others."""
    message, _ = checkpoint(tmp_path, "sd3.5")
    call = call_of("sd3", batch=1, size=(2, 1), text=1)
    expected = run_resident(message, [], [call], [1], {})["outputs"][0][0]
    for degrees in DEGREES[ranks.num_ranks]:
        answers = ranks.run("run_resident", load=message, patches=[], calls=[call], chunks=[1], degrees=degrees)
        assert (answers[0]["outputs"][0][0] - expected).abs().max() <= LIMIT * expected.abs().max()


def test_bytes_sent(ranks, tmp_path) -> None:
    """2 · (N - 1) / N of each sum (text and image, after attention and after the MLP), as in a ring's
    all-reduce; each modulation's shard to every other rank."""
    message, _ = checkpoint(tmp_path, "flux")
    call = call_of("flux", batch=1, size=(8, 8), text=8)
    num_ranks = ranks.num_ranks
    answers = ranks.run(
        "run_resident", load=message, patches=[], calls=[call], chunks=[1], degrees={"tensor": num_ranks}
    )
    tokens, hidden = 16 + 8, HEADS * 16
    num_sums = 2 * 2 + 2 * 1  # two double blocks, two single ones
    num_modulations = 2 * 12 + 2 * 3
    for answer in answers:
        assert answer["sent"] == {
            "all_reduce": num_sums * tokens * hidden * 4 * 2 * (num_ranks - 1) // num_ranks,
            "all_gather": num_modulations * hidden * 4 * (num_ranks - 1) // num_ranks,
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_its_shards(tmp_path, kind, dtype) -> None:
    message, _ = checkpoint(tmp_path, kind, dtype)
    whole = load(message, "cpu")
    plan = whole.family.plan.tensor
    cut = {
        f"{path}.weight"
        for pattern in (*plan.columns, *plan.joined, *plan.rows)
        for path, _ in find(whole.module, pattern)
    }
    state = whole.module.state_dict()
    num_cut = sum(state[name].nbytes for name in cut)
    assert num_cut > 0.8 * sum(value.nbytes for value in state.values())
    for degree in (2, 4):
        spec = ParallelSpec(tensor=degree)
        models = [load(dataclasses.replace(message, spec=spec), "cpu", rank=rank) for rank in range(degree)]
        states = [model.module.state_dict() for model in models]
        for name, value in state.items():
            shards = [state[name] for state in states if name in state]
            if name in cut:
                assert sum(shard.nbytes for shard in shards) == value.nbytes, name
                assert {shard.nbytes for shard in shards} == {value.nbytes // degree}
            elif len(shards) == 1:  # the bias of a Linear cut by rows
                assert torch.equal(states[0][name], value) and name.endswith(".bias")
            elif name.removesuffix("bias") + "weight" in cut:
                assert torch.equal(torch.cat(shards), value)
            else:
                assert len(shards) == degree and all(torch.equal(shard, value) for shard in shards)
        for model in models:
            saved = num_cut * (degree - 1) // degree
            assert sum(model.bytes_held().values()) <= sum(whole.bytes_held().values()) - saved


def test_shards_of_a_column_cut_stay_in_the_map(tmp_path) -> None:
    message, _ = checkpoint(tmp_path, "flux")
    model = load(dataclasses.replace(message, spec=ParallelSpec(tensor=2)), "cpu", rank=1)
    block = model.module.transformer_blocks[0]
    assert model._file.holds(block.attn.to_k.weight) and model._file.holds(block.ff.net[0].proj.weight)
    assert not model._file.holds(block.attn.to_out[0].weight)
    assert block.attn.to_out[0].weight.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_patched_shards_keep_no_whole_weight(tmp_path, kind) -> None:
    message, weights = checkpoint(tmp_path, kind)
    model = load(dataclasses.replace(message, spec=ParallelSpec(tensor=4)), "cpu", rank=2)
    for patches in (patches_of(kind, weights)[:4], patches_of(kind, weights)):
        model.set_patches(SetPatches(model="m", patches_id=str(len(patches)), patches=patches))
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.module.parameters()}
        private = {t.untyped_storage().data_ptr(): t.nbytes for t in model.module.parameters()}
        in_map = model._file._storage.data_ptr()
        assert all(held[place] == private[place] for place in held if place != in_map)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_stages(tmp_path, kind) -> None:
    """pipe × tensor: the shards of a stage are shards of its blocks, and patches find them."""  # noqa: RUF002
    message, weights = checkpoint(tmp_path, kind)
    patches = SetPatches(model="m", patches_id="p", patches=patches_of(kind, weights))
    spec = ParallelSpec(pipe=2, tensor=2)
    for rank in range(4):
        both = load(dataclasses.replace(message, spec=spec), "cpu", rank=rank)
        shard = load(dataclasses.replace(message, spec=ParallelSpec(tensor=2)), "cpu", rank=rank % 2)
        for model in (both, shard):
            model.set_patches(patches)
        everything, own = resident.everything(shard), resident.everything(both)
        assert both.stage == both.stages[rank // 2] and len(own) < len(everything)
        assert all(value.is_meta or torch.equal(value, everything[name]) for name, value in own.items())
        outside = sum(load(message, "cpu").bytes_held().values())
        assert sum(both.bytes_held().values()) < 0.45 * outside


def test_both_layouts_give_the_same_shards(tmp_path) -> None:
    message, weights = checkpoint(tmp_path, "flux")
    whole = load(message, "cpu")
    path = tiny.write(tmp_path / "diffusers", whole.module.state_dict())
    patches = patches_of("flux", weights)
    spec = ParallelSpec(tensor=2)
    models = [
        load(dataclasses.replace(message, spec=spec, path=name), "cpu", rank=1) for name in (message.path, path)
    ]
    for patches_id, wanted in (("", []), ("p", patches)):
        for model in models:
            model.set_patches(SetPatches(model="m", patches_id=patches_id, patches=wanted))
        assert resident.same(*(resident.everything(model) for model in models))


def test_a_patch_that_widens_a_cut_weight(tmp_path) -> None:
    message, weights = checkpoint(tmp_path, "flux")
    model = load(dataclasses.replace(message, spec=ParallelSpec(tensor=2)), "cpu")
    key = "double_blocks.0.img_mlp.2.weight"
    rows, columns = weights[key].shape
    wide = resident.lora(key, torch.Size((rows, columns + 8)))
    wide.weights[5] = [rows, columns + 8]
    with pytest.raises(ValueError, match=r"a patch widens double_blocks\.0\.img_mlp\.2\.weight, which tensor"):
        model.set_patches(SetPatches(model="m", patches_id="p", patches=[wide]))
    assert model.num_patched == 0


def test_degrees_that_do_not_divide(tmp_path) -> None:
    message, _ = checkpoint(tmp_path, "flux", spec=ParallelSpec(tensor=3))
    with pytest.raises(ValueError, match=r"tensor=3 cannot cut the 64 channels of transformer_blocks\.0\.attn\.to_q"):
        load(message, "cpu")


ROWS, COLUMNS = 12, 8


@given(data=st.data(), kind=st.sampled_from(["lora", "diff", "set"]), offset=st.booleans(), seed=st.integers(0, 9))
def test_a_part_of_a_patch_is_the_patch_of_a_part(data, kind, offset, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    begin = data.draw(st.integers(0, ROWS - 1)) if offset else 0
    rows = data.draw(st.integers(1, ROWS - begin)) if offset else ROWS
    weight = torch.randn((ROWS, COLUMNS), generator=generator)
    if kind == "lora":
        up, down = torch.randn((rows, 3), generator=generator), torch.randn((3, COLUMNS), generator=generator)
        values = [up, down, 2.0, None, None, None]
    else:
        values = [torch.randn((rows, COLUMNS), generator=generator)]
    place = [0, begin, rows] if offset else None
    patch = Patch(key="w", kind=kind, weights=values, strength=0.5, strength_model=0.7, offset=place)
    assert divisible(patch, (ROWS, COLUMNS))
    first = data.draw(st.integers(0, ROWS - 1))
    region = Region(
        row=first,
        rows=data.draw(st.integers(1, ROWS - first)),
        columns=data.draw(st.sampled_from([None, ((2, 3),), ((0, 2), (5, 3))])),
    )
    own = part_of(patch, (ROWS, COLUMNS), region)
    part = region.columns_of(weight.narrow(0, region.row, region.rows)).clone()
    expected = region.columns_of(apply_patches(weight.clone(), [patch]).narrow(0, region.row, region.rows))
    assert torch.allclose(apply_patches(part, [own] if own else []), expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_plans_name_linears(family) -> None:
    from ranks import tiny_model

    model = tiny_model(family.name, heads=4, dual=True)
    plan = family.plan.tensor
    for pattern in (*plan.columns, *plan.joined, *plan.rows):
        assert all(isinstance(part, torch.nn.Linear) for _, part in find(model.module, pattern)), pattern
        assert find(model.module, pattern), pattern
    assert all(part.heads == 4 for pattern in plan.heads for _, part in find(model.module, pattern))
    # Those that attend to a text that no rank cuts have heads to cut, too.
    with_heads = {path for path, part in model.module.named_modules() if hasattr(part, "heads")}
    assert {path for pattern in plan.heads for path, _ in find(model.module, pattern)} == with_heads
