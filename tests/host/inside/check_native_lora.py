"""Patches on ComfyUI's own classes: a worker's weights and output equal the stock MODEL's, bit for bit."""

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import native_models as make
import pytest
import torch
from check_lora import lora_file, random
from check_native_load import FLUX, stock
from check_native_sample import CASES
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.source import describe
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.patches import encode_patches, own_key

from comfy_xdit import messages as m
from comfy_xdit.errors import InputError
from comfy_xdit.parallel.spec import ParallelSpec

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

CPU = torch.device("cpu")
LATENT, CONDS = (1, 16, 16, 12), FLUX | {"guidance": (1,)}
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
MLP = "diffusion_model.double_blocks.1.txt_mlp.0"
LINEAR = "diffusion_model.single_blocks.1.linear2"
NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight"
KINDS = ("lora", "dora", "loha", "lokr", "glora", "oft", "boft", "diff", "set")


class Worker:
    """What a rank does for a model, in this process."""

    def __init__(self, patcher, part=None):
        from comfy_xdit.native.load import load, whole
        from comfy_xdit.native.patches import WeightPatches

        message = describe(patcher)
        self.loaded = load(message.path, message.source, CPU, part or whole)
        self.patches = WeightPatches(self.loaded, CPU)

    def wear(self, patches, name="a"):
        """The patches of a MODEL, through their wire form; how many weights changed."""
        message = m.SetPatches(model="m", patches_id=name if patches else "", patches=encode_patches(patches, own_key))
        return self.patches.set(m.decode(*m.encode(message)))

    def tensors(self):
        return tensors(self.loaded.model)

    def run(self, call):
        given = dict(call)
        return self.loaded.model.diffusion_model(given.pop("x"), given.pop("timestep"), **given)


def tensors(model):
    """Name → the tensors that a weight is made of, as they are now; quantised ones as bytes."""
    from comfy_xdit.native.resident import plain_tensors

    return {
        name: [plain.clone() for plain in plain_tensors(value)]
        for name, value in model.diffusion_model.named_parameters()
    }


def different(a, b):
    """Names of weights whose bytes differ."""
    assert a.keys() == b.keys()
    return {name for name in a if not all(same(x, y) for x, y in zip(a[name], b[name], strict=True))}


def same(a, b):
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def dressed(patcher, *loras, strength=0.8):
    for lora in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)
    return patcher


def worn(patcher):
    """The weights of the stock MODEL with its patches on."""
    comfy.model_management.load_models_gpu([patcher])
    return tensors(patcher.model)


def shape_of(patcher, name):
    return tuple(patcher.model.get_parameter(f"{name}.weight").shape)


def some_loras(patcher):
    """Of several kinds, with an offset (rows of a fused matrix), DoRA, a bias, and a norm."""
    files = [
        lora_file("lora", QKV, *shape_of(patcher, QKV)),
        lora_file("dora", MLP, *shape_of(patcher, MLP)),
        lora_file("lokr", LINEAR, *shape_of(patcher, LINEAR)),
    ]
    rows = shape_of(patcher, QKV)[1]
    kohya = "lora_transformer_transformer_blocks_1_attn_to_k"
    files.append({f"{kohya}.lora_up.weight": random(rows, 4), f"{kohya}.lora_down.weight": random(4, rows, seed=1)})
    files.append({f"{MLP}.diff_b": random(shape_of(patcher, MLP)[0])})
    files.append({NORM.replace(".weight", ".diff"): random(*patcher.model.state_dict()[NORM].shape)})
    return files


@pytest.mark.parametrize("form", make.FLUX_FORMS)
def test_formats(form, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux(form))
    patcher = comfy.sd.load_diffusion_model(str(path))
    patched = dressed(patcher, *some_loras(patcher))
    assert len(patched.patches) == 6
    comfy.model_management.load_models_gpu([patcher])
    plain, call = stock(patcher, LATENT, CONDS)
    worker = Worker(patcher)
    base = worker.tensors()
    assert not different(base, tensors(patcher.model))
    expected = worn(patched)
    assert len(different(expected, base)) == 6, "the LoRAs count"
    output, call = stock(patched, LATENT, CONDS)
    assert not torch.equal(output, plain)

    assert worker.wear(patched.patches) == 6 == worker.patches.num_patched
    assert not different(worker.tensors(), expected) and not worker.patches.misfits
    assert torch.equal(worker.run(call), output)
    assert worker.wear({}) == 6
    assert worker.patches.num_patched == 0 and not different(worker.tensors(), base)
    assert torch.equal(worker.run(call), plain), "off is as never"


def test_what_was_a_view_of_the_file_is_one_again(tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("nvfp4"))
    patcher = comfy.sd.load_diffusion_model(str(path))
    worker = Worker(patcher)

    def mapped():
        from comfy_xdit.native.resident import plain_tensors

        named = worker.loaded.model.diffusion_model.named_parameters()
        parts = [(name, part) for name, value in named for part in plain_tensors(value)]
        return {(name, part.data_ptr()) for name, part in parts if part.data_ptr() in worker.loaded.addresses}

    before = mapped()
    worker.wear(dressed(patcher, *some_loras(patcher)).patches)
    gone = {name.removesuffix(".weight") for name, _ in before - mapped()}
    assert {QKV, MLP, LINEAR} <= {f"diffusion_model.{name}" for name in gone}
    worker.wear({})
    assert mapped() == before


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8_tensorwise", "nvfp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, form, models_of):
    patcher, worker = models_of(form)
    base = worker.tensors()
    patched = dressed(patcher, lora_file(kind, QKV, *shape_of(patcher, QKV)), strength=-0.7)
    worker.wear(patched.patches, kind)
    expected = worn(patched)
    assert different(expected, base) == {QKV.removeprefix("diffusion_model.") + ".weight"}
    assert not different(worker.tensors(), expected)
    worker.wear({})
    assert not different(worker.tensors(), base)


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    made = {}

    def of(form):
        if form not in made:
            path = make.save(tmp_path_factory.mktemp("models") / "flux.safetensors", make.flux(form))
            patcher = comfy.sd.load_diffusion_model(str(path))
            made[form] = patcher, Worker(patcher)
        return made[form]

    with torch.inference_mode():
        yield of


@pytest.mark.parametrize("form", ["bf16", "fp8", "nvfp4"])
def test_the_next_patches_replace_the_ones_before(form, models_of):
    patcher, worker = models_of(form)
    base = worker.tensors()
    first = dressed(patcher, *some_loras(patcher)[:3])
    other = dressed(patcher, *some_loras(patcher)[2:], strength=-0.3)
    worker.wear(first.patches, "first")
    assert worker.wear(first.patches, "first") == 0, "it wears them already"
    assert worker.wear(other.patches, "other") == 6
    assert worker.patches.num_patched == 4
    assert not different(worker.tensors(), worn(other))
    worker.wear({})
    assert not different(worker.tensors(), base)


@pytest.mark.parametrize("form", ["bf16", "fp8", "nvfp4"])
def test_merged_models(form, models_of, tmp_path):
    import comfy_extras.nodes_model_merging as merging

    patcher, worker = models_of(form)
    plain = make.weights(make.tiny.flux_config(), seed=99)
    other = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "other.safetensors", plain)))
    other = dressed(other, some_loras(other)[0])
    merged = dressed(merging.ModelMergeSimple().merge(patcher, other, 0.3)[0], some_loras(patcher)[1])
    base = worker.tensors()
    worker.wear(merged.patches)
    expected = worn(merged)
    assert len(different(expected, base)) > 30
    assert not different(worker.tensors(), expected)
    worker.wear({})
    assert not different(worker.tensors(), base)


def test_offset_function_and_strength_of_the_model(models_of):
    for form in ("bf16", "nvfp4"):
        patcher, worker = models_of(form)
        patched, (rows, columns) = patcher.clone(), shape_of(patcher, QKV)
        key, third = f"{QKV}.weight", rows // 3
        for start, function in ((0, None), (third, comfy.utils.swap_scale_shift)):
            change = (random(third, columns, seed=start),)
            patched.add_patches({(key, (0, start, third), function): change}, 0.5, 0.9)
        patched.add_patches({key: ("set", (random(rows, columns, seed=5),))}, 1.0, 1.0)
        patched.add_patches({key: (random(rows, columns, seed=6),)}, 0.25, 0.5)
        assert len(patched.patches[key]) == 4
        worker.wear(patched.patches)
        assert not different(worker.tensors(), worn(patched))
        worker.wear({})


def test_what_does_not_fit_is_left_out_and_told(models_of, caplog):
    patcher, worker = models_of("nvfp4")
    wrong = lora_file("lora", MLP, 40, 24)
    patched = dressed(patcher, some_loras(patcher)[0], wrong)
    patched.add_patches({f"{LINEAR}.weight": (random(3, 4),)}, 0.5, 0.5)
    worker.wear(patched.patches)
    assert [key for key, _ in worker.patches.misfits] == [
        f"{name.removeprefix('diffusion_model.')}.weight" for name in (MLP, LINEAR)
    ]
    assert not different(worker.tensors(), worn(patched)), "what it does to the weight before it still does"
    worker.wear({})
    assert not worker.patches.misfits


def test_a_rank_with_a_part_of_the_model(tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("mixed"))
    patcher = comfy.sd.load_diffusion_model(str(path))
    whole = Worker(patcher)
    part = Worker(patcher, part=lambda net: lambda key, weight: None if key.startswith("double_blocks.0") else weight)
    wrong = lora_file("lora", "diffusion_model.double_blocks.0.txt_mlp.0", 40, 24)
    patches = dressed(patcher, *some_loras(patcher), wrong).patches
    assert whole.wear(patches) == 7 and part.wear(patches) == 4
    assert part.patches.misfits == whole.patches.misfits and len(part.patches.misfits) == 1
    here = {key: value for key, value in whole.tensors().items() if not key.startswith("double_blocks.0")}
    there = {key: value for key, value in part.tensors().items() if key in here}
    assert not different(there, here)
    bias = "single_blocks.0.linear2.bias"
    cut = Worker(patcher, part=lambda net: lambda key, weight: weight[:8] if key == bias else weight)
    with pytest.raises(InputError, match="tensor=1"):
        cut.wear(patches)
    assert cut.wear({}) == 0


@pytest.mark.parametrize("form", [None, "nvfp4"])
def test_a_stage_of_a_pipeline(form, tmp_path):
    from comfy_xdit.native.families import family_of
    from comfy_xdit.native.stage import keep_share

    weights = make.weights(make.wan())
    path = make.save(tmp_path / "wan.safetensors", make.quantised(weights, [form]) if form else weights)
    patcher = comfy.sd.load_diffusion_model(str(path))
    patches = dressed(patcher, block_lora(patcher, "lora")).patches
    whole = Worker(patcher)
    assert whole.wear(patches) == 3
    expected, count = whole.tensors(), 0
    for rank in range(2):
        share = ParallelSpec(pipe=2).weights_of(rank, "time")
        stage = Worker(patcher, part=lambda net, share=share: keep_share(net, family_of("WAN21_T2V"), share)[1])
        base = stage.tensors()
        count += stage.wear(patches)
        assert stage.patches.misfits == whole.patches.misfits and len(whole.patches.misfits) == 1
        worn = stage.tensors()
        assert not different(worn, {key: expected[key] for key in worn})
        stage.wear({})
        assert not different(stage.tensors(), base)
    assert count == 3


def test_weights_that_were_computed_from_the_file(tmp_path, monkeypatch):
    """As of a file in diffusers' layout: there is no view to come back to."""
    import comfy_xdit.native.load as load

    patcher = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "flux.safetensors", make.flux("mixed"))))
    monkeypatch.setattr(load, "_span", lambda views: range(0))
    worker = Worker(patcher)
    base, patched = worker.tensors(), dressed(patcher, *some_loras(patcher))
    assert not worker.loaded.can_restore(QKV.removeprefix("diffusion_model."))
    for _ in range(2):
        worker.wear(patched.patches)
        assert not different(worker.tensors(), worn(patched))
        worker.wear({})
        assert not different(worker.tensors(), base)


def test_faults_leave_the_model_without_patches(models_of, monkeypatch):
    import comfy.weight_adapter

    patcher, worker = models_of("bf16")
    base, patches = worker.tensors(), dressed(patcher, *some_loras(patcher)).patches

    def fails(patches, why, error=InputError):
        with pytest.raises(error, match=why):
            worker.wear(patches, "faulty")
        assert not worker.patches.id and not worker.patches.num_patched and not worker.patches.misfits
        assert not different(worker.tensors(), base)

    change = [(1.0, (random(4, 4),), 1.0, None, None)]
    fails(patches | {"diffusion_model.nowhere.weight": change}, r"patch for nowhere\.weight, a weight that this model")
    fails({f"{QKV}.weight": [(*change[0][:3], (0, 0, 10**6), None)]}, "for the part")
    with pytest.raises(ValueError, match="no weight of the transformer"):
        encode_patches({"model_sampling.sigmas": change}, own_key)
    larger = lora_file("lora", QKV, *shape_of(patcher, QKV)) | {f"{QKV}.reshape_weight": torch.tensor([900, 256])}
    with pytest.raises(ValueError, match="enlarges"):
        encode_patches(dressed(patcher, larger).patches, own_key)
    values = [*dressed(patcher, larger).patches[f"{QKV}.weight"][0][1].weights]
    sent = m.Patch(key=f"{QKV}.weight".removeprefix("diffusion_model."), kind="lora", weights=values, strength=1.0)
    with pytest.raises(InputError, match="enlarges"):
        worker.patches.set(m.SetPatches(model="m", patches_id="a", patches=[sent]))
    # ComfyUI logs what goes wrong inside of an adapter, and goes on without it.
    for text, error in (("no such kernel", InputError), ("CUDA out of memory", MemoryError)):

        def fail(*args, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(comfy.weight_adapter.lora, "weight_decompose", fail)
        fails(patches, text, error)


def block_lora(patcher, kind):
    """A LoRA on the first and the last matrix of a model's blocks, and one that does not fit."""
    names = [name[:-7] for name, value in patcher.model.named_parameters() if "blocks" in name and value.ndim == 2]
    first, last = names[0], names[-1]
    return (
        lora_file(kind, first, *shape_of(patcher, first))
        | lora_file("lora", last, *shape_of(patcher, last))
        | lora_file("lora", names[1], 3, 4)
    )


@pytest.mark.parametrize(
    ("name", "form"), [("wan", None), ("wan", "int8_tensorwise"), ("qwen", None), ("qwen", "nvfp4")]
)
def test_workflows_of_other_families(name, form, tmp_path, pools, caplog):
    """Loaders and LoRA nodes, ours, a sampler: LoRA before it, after it, and off again."""
    case = CASES[name]
    weights = make.weights(getattr(make, name)())
    path = make.save(tmp_path / f"{name}.safetensors", make.quantised(weights, [form]) if form else weights)
    model = comfy.sd.load_diffusion_model(str(path))
    lora, pool = block_lora(model, "lokr"), pools(1)
    patched = dressed(model, lora)
    expected, plain = case.run(patched), case.run(model)
    assert not torch.equal(expected, plain)
    ours = parallelize(model, pool)
    caplog.clear()
    assert torch.equal(case.run(parallelize(patched, pool)), expected)
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and said[0].startswith("ERROR lora diffusion_model."), "as stock ComfyUI says it"
    assert torch.equal(case.run(ours), plain)
    assert torch.equal(case.run(dressed(ours, lora)), expected)
