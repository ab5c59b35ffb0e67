"""Pipeline stages: balanced runs of blocks, and models that hold only theirs."""

import itertools

import pytest
import test_resident_model as resident
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit.messages import LoadModel, Patch, SetPatches
from comfy_xdit.models.flux import FLUX
from comfy_xdit.models.resident import load
from comfy_xdit.models.sd3 import SD3
from comfy_xdit.parallel.spec import AXES, ParallelSpec
from comfy_xdit.parallel.stages import Absent, block_costs, block_paths, stages

AFTER = ("norm_out.", "proj_out.")

costs_lists = st.lists(st.integers(1, 50), min_size=1, max_size=9)


def sizes(costs, num_stages):
    return [len(run) for run in stages(costs, num_stages)]


def all_ways(num_blocks, num_stages):
    for ends in itertools.combinations(range(1, num_blocks), num_stages - 1):
        yield [range(*run) for run in itertools.pairwise((0, *ends, num_blocks))]


@given(costs=costs_lists, data=st.data())
def test_no_other_runs_are_better(costs, data) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    found = stages(costs, num_stages)
    assert list(itertools.chain(*found)) == list(range(len(costs)))
    assert len(found) == num_stages and all(found)

    def key(runs):
        loads = [sum(costs[block] for block in run) for run in runs]
        return max(loads), sum(cost * cost for cost in loads)

    assert key(found) == min(map(key, all_ways(len(costs), num_stages)))


def test_no_stage_of_leftovers() -> None:
    assert sizes([1] * 57, 8) == [8, 7, 7, 7, 7, 7, 7, 7]
    assert sizes([1] * 8, 5) == [2, 2, 2, 1, 1]
    assert sizes([24, *[10] * 9], 3) == [2, 4, 4]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_stages_without_blocks(num_stages) -> None:
    with pytest.raises(ValueError, match=f"3 blocks cannot make {num_stages} stages; use 1 to 3"):
        stages([1, 1, 1], num_stages)


def test_every_weight_share_is_held_equally_often() -> None:
    """Numbers of ranks follow the mesh: the last axis runs fastest."""
    spec = ParallelSpec(cfg=2, pipe=3, ulysses=2, tensor=2)
    shares = [spec.weights_of(rank) for rank in range(spec.num_ranks)]
    mesh = torch.arange(spec.num_ranks).view(tuple(spec.degrees.values()))
    for rank, share in enumerate(shares):
        place = dict(zip(AXES, (mesh == rank).nonzero()[0].tolist(), strict=True))
        assert (share.stage, share.shard) == (place["pipe"], place["tensor"])
        assert (share.num_stages, share.num_shards) == (3, 2)


def parts(tmp_path, kind, num_stages, balance="time"):
    """A whole model, and the models of each stage."""
    whole, weights = resident.make(tmp_path, kind)
    message = LoadModel(
        model="m",
        path=whole._file.path,
        prefix="",
        family=whole.family.name,
        storage_dtype="float32",
        compute_dtype="float32",
        spec=ParallelSpec(pipe=num_stages),
        balance=balance,
    )
    return whole, weights, [load(message, "cpu", rank=rank) for rank in range(num_stages)]


def held(model):
    return {key: value for key, value in model.module.state_dict().items() if not value.is_meta}


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("kind", ["flux", "sd35", "pixart"])
def test_only_own_blocks_are_held(tmp_path, kind, num_stages) -> None:
    whole, _, models = parts(tmp_path, kind, num_stages)
    everything = held(whole)
    paths = whole.block_paths
    in_blocks = {key for key in everything if key.startswith(tuple(f"{path}." for path in paths))}
    after = {key for key in everything if key.startswith(AFTER)}
    for model in models:
        mine = held(model)
        own = tuple(f"{paths[block]}." for block in model.stage)
        assert {key for key in mine if key in in_blocks} == {key for key in in_blocks if key.startswith(own)}
        assert (after <= mine.keys()) == (not after.isdisjoint(mine)) == (model is models[-1])
        assert everything.keys() - in_blocks - after <= mine.keys()
        assert all(torch.equal(value, everything[key]) for key, value in mine.items())
        absent = [path for path in paths if isinstance(model.module.get_submodule(path), Absent)]
        assert absent == [path for block, path in enumerate(paths) if block not in model.stage]
    total = sum(whole.bytes_held().values())
    largest = max(sum(value.nbytes for value in whole.module.get_submodule(path).parameters()) for path in paths)
    outside = sum(everything[key].nbytes for key in everything.keys() - in_blocks)
    for model in models:
        assert sum(model.bytes_held().values()) <= (total - outside) / num_stages + outside + largest


@pytest.mark.parametrize("kind", ["flux", "sd35", "pixart"])
def test_stages_one_after_the_other_are_the_model(tmp_path, kind) -> None:
    """What a stage's last block gives is what the next stage's absent block before its first gives there."""
    whole, _, models = parts(tmp_path, kind, 3)
    carried = None
    for model in models:
        blocks = [model.module.get_submodule(path) for path in model.block_paths]
        if carried is not None:
            blocks[model.stage[0] - 1].register_forward_hook(lambda block, args, out, came=carried: came)

        class End(Exception):
            pass

        def leave(block, args, out):
            nonlocal carried
            carried = out
            raise End

        if model is not models[-1]:
            blocks[model.stage[-1]].register_forward_hook(leave)
            with pytest.raises(End):
                resident.run(model)
        else:
            assert torch.equal(resident.run(model), resident.run(whole))


@pytest.mark.parametrize("kind", ["flux", "sd35", "pixart"])
def test_each_stage_wears_its_part_of_the_patches(tmp_path, kind) -> None:
    whole, weights, models = parts(tmp_path, kind, 3)
    before = held(whole)
    patches = [resident.lora(key, value.shape, 0.3) for key, value in weights.items() if key.endswith("weight")]
    message = SetPatches(model="m", patches_id="p", patches=patches)
    changed = whole.set_patches(message)
    everything = held(whole)
    for model in models:
        base = {key: value.clone() for key, value in held(model).items()}
        assert 0 < model.set_patches(message) < changed
        assert model.patches_id == "p"
        assert all(torch.equal(value, everything[key]) for key, value in held(model).items())
        model.set_patches(SetPatches(model="m", patches_id="", patches=[]))
        assert all(torch.equal(value, base[key]) for key, value in held(model).items())
        assert base.keys() <= before.keys()


def test_a_bad_patch_is_every_stages_fault(tmp_path) -> None:
    _, _, models = parts(tmp_path, "flux", 2)
    bad = Patch(key="double_blocks.0.img_attn.proj.weight", kind="zip", weights=[], strength=1.0)
    for model in models:
        with pytest.raises(ValueError, match="unknown kind of patch 'zip'"):
            model.set_patches(SetPatches(model="m", patches_id="p", patches=[bad]))
        assert model.patches_id == "" and model.num_patched == 0


SD35_LARGE = {
    "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "qk_norm": "rms_norm", "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "qk_norm": "rms_norm", "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}


@pytest.mark.parametrize(
    ("family", "config", "billions"),
    [(FLUX, {"guidance_embeds": True}, 11.90), (SD3, SD35_LARGE, 8.06), (SD3, SD35_MEDIUM, 2.24)],
    ids=["flux-dev", "sd3.5-large", "sd3.5-medium"],
)
def test_stages_of_equal_weights_in_real_sizes(family, config, billions) -> None:
    """Each rank's parameters, its embedders included, are 1/N of the model's but for one block."""
    with torch.device("meta"):
        module = family.model_class()(**config)
    plan = family.plan
    everything = sum(weight.numel() for weight in module.parameters())
    assert everything / 1e9 == pytest.approx(billions, abs=0.006)
    blocks = [sum(w.numel() for w in module.get_submodule(path).parameters()) for path in block_paths(module, plan)]
    last = sum(w.numel() for name in family.after_blocks for w in module.get_submodule(name).parameters())
    first = everything - sum(blocks) - last
    costs = block_costs(module, plan, "memory")
    for num_stages in range(2, 9):
        runs = stages(costs, num_stages)
        held = [first + sum(blocks[block] for block in run) for run in runs]
        held[-1] += last
        assert all(abs(each - everything / num_stages) <= max(blocks) for each in held)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("kind", ["flux", "sd35"])
def test_stages_of_equal_weights_hold_equal_bytes(tmp_path, kind, num_stages) -> None:
    whole, _, models = parts(tmp_path, kind, num_stages, "memory")
    modules = [whole.module.get_submodule(path) for path in whole.block_paths]
    blocks = [sum(value.nbytes for value in module.parameters()) for module in modules]
    outside = sum(whole.bytes_held().values()) - sum(blocks)
    after = sum(value.nbytes for model in models for key, value in held(model).items() if key.startswith(AFTER))
    for model in models:
        own = sum(model.bytes_held().values()) - (outside if model is models[-1] else outside - after)
        assert own == sum(blocks[block] for block in model.stage)
        assert abs(own - sum(blocks) / num_stages) <= max(blocks)
    assert [block for model in models for block in model.stage] == list(range(len(blocks)))


def test_a_balance_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="stages cannot be balanced by 'luck'; use time or memory"):
        ParallelSpec(pipe=2).weights_of(0, "luck")
    # A model on one stage is held alike whatever the balance: it need not be loaded anew.
    assert ParallelSpec(tensor=2).weights_of(1, "memory") == ParallelSpec(tensor=2).weights_of(1)


def test_flux_in_its_real_size() -> None:
    """A double block has more than twice the weights of a single one, and takes hardly more time."""
    with torch.device("meta"):
        module = FLUX.model_class()(guidance_embeds=True)
    paths, costs = block_paths(module, FLUX.plan), block_costs(module, FLUX.plan)
    assert paths[18:20] == ["transformer_blocks.18", "single_transformer_blocks.0"] and len(costs) == 57
    assert costs[19] < costs[18] < 1.1 * costs[19]
    for num_stages in (2, 3, 4, 8):
        loads = [sum(costs[block] for block in run) for run in stages(costs, num_stages)]
        assert max(loads) - min(loads) <= max(costs)
    assert [len(run) for run in stages(costs, 2)] == [28, 29]
