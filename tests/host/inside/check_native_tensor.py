"""Tensor parallel on ComfyUI's own classes: equal to ComfyUI's own run, LoRA on and off; a rank holds its part only."""

import dataclasses
import logging

import comfy.sd
import native_models as make
import pytest
import torch
from check_native_lora import Worker, block_lora, different, dressed, some_loras
from check_native_sample import Case, plain, random
from check_selftest import KNOWN
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize

from comfy_xdit.errors import InputError
from comfy_xdit.native.families import family_of
from comfy_xdit.native.selftest import outcomes_of
from comfy_xdit.native.stage import keep_share
from comfy_xdit.native.subject import build, exists
from comfy_xdit.native.subjects import SUBJECTS
from comfy_xdit.parallel.paths import find
from comfy_xdit.parallel.spec import ParallelSpec, check
from comfy_xdit.parallel.tensor import shards

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

LIMIT = 1e-5
MODES = {
    "tensor=2": (2, {"tensor": 2}),
    "tensor=2, ulysses=2": (4, {"tensor": 2, "ulysses": 2}),
    "tensor=2, pipe=2, all exact": (4, {"tensor": 2, "pipe": 2, "warmup_steps": 10_000}),
    "tensor=2, cfg=2": (4, {"tensor": 2, "cfg": 2}),
    "tensor=2, distri=2, all exact": (4, {"tensor": 2, "distri": 2, "warmup_steps": 10_000}),
}
FOUR = {"dim": 512, "num_heads": 4}
CASES = {
    "wan": Case(lambda: plain(make.wan(**FOUR)), (2, 16, 3, 10, 12), 4096),
    "wan i2v": Case(
        lambda: plain(make.wan("WAN21_I2V", model_type="i2v", in_dim=36, **FOUR)),
        (1, 16, 3, 10, 12),
        4096,
        concat_latent_image=random(1, 16, 3, 10, 12, seed=5),
        concat_mask=(random(1, 1, 3, 10, 12, seed=6) > 0).float(),
    ),
    "qwen": Case(lambda: plain(make.qwen()), (1, 16, 1, 10, 12), 3584),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """`stock(name)`: the MODEL of a case, and its latent as ComfyUI makes it."""
    return make.loaded_once(CASES, tmp_path_factory)


def error_of(ours, expected):
    assert expected.isfinite().all() and expected.std() > 0
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name, mode, stock, pools):
    if name == "qwen" and mode not in ("tensor=2", "tensor=2, ulysses=2"):
        pytest.skip("what the methods do together is tried on small models")
    model, expected = stock(name)
    num_ranks, degrees = MODES[mode]
    error = error_of(CASES[name].run(parallelize(model, pools(num_ranks, **degrees))), expected)
    log.info("%s %s: %.1e", name, mode, error)
    assert error <= LIMIT


@pytest.mark.parametrize("mode", ["tensor=2", "tensor=2, ulysses=2"])
def test_lora_on_and_off(mode, stock, pools):
    model, _ = stock("wan")
    num_ranks, degrees = MODES[mode]
    ours = parallelize(model, pools(num_ranks, **degrees))
    case, lora = CASES["wan"], block_lora(model, "lokr")
    never, expected = case.run(ours), case.run(dressed(model, lora))
    assert error_of(never, expected) > 1e-3, "the LoRA counts"
    assert error_of(case.run(dressed(ours, lora)), expected) <= LIMIT
    assert torch.equal(case.run(ours), never), "off is as never"


def ranks_of(patcher, degree):
    """What each rank of tensor holds, in this process."""
    family = family_of(type(patcher.model.model_config).__name__)
    shares = [ParallelSpec(tensor=degree).weights_of(rank) for rank in range(degree)]
    return [Worker(patcher, part=lambda net, share=share: keep_share(net, family, share)[1]) for share in shares]


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_patches_are_the_whole_layers_and_then_cut(form, tmp_path, degree=2):
    """LoRA, DoRA, LoKr, rows of a fused matrix, a bias and a norm; to the bit, on a file in fp32 or bf16."""
    patcher = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "flux.safetensors", make.flux(form))))
    net, family = patcher.model.diffusion_model, family_of("Flux")
    whole = Worker(patcher)
    patches = dressed(patcher, *some_loras(patcher)).patches
    base = whole.tensors()
    whole.wear(patches)
    worn = whole.tensors()
    assert different(base, worn)
    for rank, worker in enumerate(ranks_of(patcher, degree)):
        parts = shards(net, family.plan.tensor, ParallelSpec(tensor=degree).weights_of(rank))

        def part_of(tensors, parts=parts):
            found = {name: parts.get(name) for name in tensors if name not in parts or parts[name]}
            return {name: [shard.of(tensors[name][0]) if shard else tensors[name][0]] for name, shard in found.items()}

        assert not different(worker.tensors(), part_of(base))
        held = sum(x.numel() for (x,) in worker.tensors().values()) / sum(x.numel() for (x,) in base.values())
        log.info("%s tensor=%d: rank %d holds %.1f %% of a tiny Flux.1", form, degree, rank, 100 * held)
        worker.wear(patches)
        assert not different(worker.tensors(), part_of(worn))
        worker.wear({})
        assert not different(worker.tensors(), part_of(base))


def test_a_rank_holds_about_half(stock):
    patcher, _ = stock("qwen")
    blocks = [f"transformer_blocks.{number}." for number in range(2)]

    def bytes_of(worker):
        named = worker.loaded.model.diffusion_model.named_parameters()
        return sum(weight.untyped_storage().nbytes() if weight.data_ptr() not in worker.loaded.addresses
                   else weight.nbytes for name, weight in named if name.startswith(tuple(blocks)))

    whole = bytes_of(Worker(patcher))
    shares = [bytes_of(worker) / whole for worker in ranks_of(patcher, 2)]
    log.info("qwen: the ranks hold %s of the blocks", [f"{share:.2%}" for share in shares])
    # The first rank alone has the biases of what is added up.
    assert shares == pytest.approx([0.5, 0.5], abs=1e-3)


def test_quantised_weights_are_refused(tmp_path):
    weights = make.quantised(make.weights(make.wan()), ["nvfp4"])
    patcher = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "wan.safetensors", weights)))
    shape = parallelize(patcher).model.checkpoint.shape
    (fault,) = check(ParallelSpec(tensor=2), num_ranks=2, shape=shape)
    assert fault.startswith("Wan can't run with tensor yet; use ")
    with pytest.raises(InputError, match="when its weights are quantised"):
        ranks_of(patcher, 2)


WITH_TENSOR = [name for name, family in KNOWN.items() if family.plan.tensor is not None]


@pytest.mark.parametrize("name", WITH_TENSOR)
def test_each_family_is_tried_with_tensor(name):
    """So no tiny model has sizes that leave it out."""
    for subject in (subject for subject in SUBJECTS[name] if exists(subject.kind)):
        shape = KNOWN[name].shape(build(subject.kind, subject.config))
        assert "tensor" in shape.methods and shape.tensor_divides > 1, subject.kind


def damaged(tensor):
    """(line, what, the plan with this line less, or with its pieces taken for one)."""
    for field in dataclasses.fields(tensor):
        lines = getattr(tensor, field.name)
        for line in lines:
            rest = [name for name in lines if name != line]
            less = {name: lines[name] for name in rest} if isinstance(lines, dict) else tuple(rest)
            yield line, f"{field.name} {line}", dataclasses.replace(tensor, **{field.name: less})
    for line, widths in tensor.fused.items():
        if len(widths) > 1:
            yield line, f"{line} in one piece", dataclasses.replace(tensor, fused={**tensor.fused, line: (1,)})


def degree_of(family, subject):
    """The least that cuts the tiny model."""
    whole = family.shape(build(subject.kind, subject.config)).tensor_divides
    return next(degree for degree in range(2, whole + 1) if whole % degree == 0)


def test_every_damaged_line_of_tensor_is_refused():
    """But for modulations: what is whole on every rank is right, too; and for layers that no tiny model has."""
    silent, num = [], 0
    for name in WITH_TENSOR:
        family = KNOWN[name]
        subjects = [(each, degree_of(family, each)) for each in SUBJECTS[name] if exists(each.kind)]
        models = [build(each.kind, each.config) for each, _ in subjects]
        for line, what, tensor in damaged(family.plan.tensor):
            if what.startswith("joined ") or not any(find(model, line) for model in models):
                continue
            num += 1
            other = dataclasses.replace(family, plan=dataclasses.replace(family.plan, tensor=tensor))
            found = (
                outcome
                for subject, degree in subjects
                for outcome in outcomes_of(other, [subject], [ParallelSpec(tensor=degree)])
            )
            if all(outcome.holds for outcome in found):
                silent.append(f"{name} {what}")
    log.info("%d of %d damaged lines of tensor refused: %s", num - len(silent), num, silent)
    assert num > 80 and not silent
