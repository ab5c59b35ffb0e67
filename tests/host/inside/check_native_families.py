"""The first families from tiny files: stock loader, our node, a sampler with what nodes give it; equal to stock.

Each case runs in all modes, with a LoRA on and off, with odd sizes, with two images and texts of different lengths, and
in bfloat16. The numbers are logged.
"""

import dataclasses
import logging

import comfy.sd
import native_cases as cases
import pytest
import torch
from check_lora import lora_file
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize
from native_cases import error_of

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

MODES = {
    "1 rank": (1, {}),
    "1 rank, step by step": (1, {"sampling": "step"}),
    "ulysses=2": (2, {"ulysses": 2}),
    "ring=3": (3, {"ring": 3}),
    "cfg=2": (2, {"cfg": 2}),
    "pipe=2": (2, {"pipe": 2, "warmup_steps": 10_000}),
    "distri=2, all exact": (2, {"distri": 2, "warmup_steps": 10_000}),
}

PATCHES = (2, {"pipe": 2, "num_patches": 3})

EXACT = "1 rank, step by step"
"""To the bit. In runs of the workers' own a batch has the two texts in the other order, which may round otherwise."""

if use_comfy() is None:
    CASES = {}
else:
    CASES = cases.made(
        *(cases.minimax_cases, cases.ltx_cases, cases.wan_cases, cases.image_cases, cases.hunyuan_cases),
        cases.cosmos_cases,
    )


@dataclasses.dataclass(frozen=True)
class Tried:
    """A case, its MODEL of the stock loader, and the latents that ComfyUI makes of it."""

    name: str
    case: cases.Case
    model: object
    expected: list

    def on(self, pools, mode, model=None, **given):
        """The latents of `model`, or the case's own, on a pool."""
        num_ranks, degrees = MODES[mode]
        return self.case.run(parallelize(model or self.model, pools(num_ranks, **degrees)), **given)


# Of the module: so one case's tests run one after the other, on one MODEL.
@pytest.fixture(scope="module", params=CASES)
def tried(request, tmp_path_factory):
    case = CASES[request.param]
    model = case.load(tmp_path_factory.mktemp("family") / "model.safetensors")
    return Tried(request.param, case, model, case.run(model))


@pytest.fixture
def alone(tried):
    """The plain case of a family: what all its cases have alike is tried once."""
    if len(tried.name.split()) > 1:
        pytest.skip("tried with the family's plain case")
    return tried


def limit_of(mode, case):
    return 0 if mode == EXACT else case.limit


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_stock(mode, tried, pools):
    if "pipe" in mode and not tried.case.has_pipe:
        pytest.skip("no pipeline can be made of its blocks")
    error = error_of(tried.on(pools, mode), tried.expected)
    log.info("%s %s: %.1e", tried.name, mode, error)
    assert error <= limit_of(mode, tried.case)


def test_near_to_stock_in_patches(tried, pools):
    """`check_native_pipefusion.py` says how near some are to what they should be; here nothing is no number."""
    if not tried.case.has_pipe:
        pytest.skip("no pipeline can be made of its blocks")
    num_ranks, degrees = PATCHES
    error = error_of(tried.case.run(parallelize(tried.model, pools(num_ranks, **degrees))), tried.expected)
    log.info("%s in patches: %.1e", tried.name, error)
    assert error <= tried.case.near


@pytest.mark.parametrize("mode", ["1 rank", "pipe=2"])
def test_exact_with_one_text(mode, tried, pools):
    """Nothing is batched there, so the order in a batch makes no difference."""
    if "pipe" in mode and not tried.case.has_pipe:
        pytest.skip("no pipeline can be made of its blocks")
    assert error_of(tried.on(pools, mode, cfg=1.0), tried.case.run(tried.model, cfg=1.0)) == 0


def test_what_a_workflow_adds_counts(tried):
    for name in tried.case.counts:
        given = {"both": tried.case.both, "positive": tried.case.positive}
        less = {part: {key: more[key] for key in more if key != name} for part, more in given.items()}
        without = dataclasses.replace(tried.case, **less)
        assert error_of(without.run(tried.model), tried.expected) > 1e-4, name


def test_odd_sizes(tried, pools):
    expected = tried.case.run(tried.model, odd=True)
    for mode in (EXACT, "ring=3"):
        error = error_of(tried.on(pools, mode, odd=True), expected)
        log.info("%s %s, odd sizes: %.1e", tried.name, mode, error)
        assert error <= limit_of(mode, tried.case)


@pytest.mark.parametrize("mode", [EXACT, "ulysses=2", "cfg=2"])
def test_two_images_and_texts_of_other_lengths(mode, tried, pools):
    given = {"rows": tried.case.rows, "lengths": (9, 7)}
    error = error_of(tried.on(pools, mode, **given), tried.case.run(tried.model, **given))
    log.info("%s %s, %s: %.1e", tried.name, mode, given, error)
    assert error <= limit_of(mode, tried.case)


def test_lora_on_and_off(alone, pools):
    """On three matrices of blocks: the first, one in the middle, and the last."""
    weights = {key: weight for key, weight in alone.model.model.named_parameters() if key.endswith(".weight")}
    blocks = [key for key, weight in weights.items() if weight.ndim == 2 and "blocks." in key]
    lora = {}
    for key in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
        lora |= lora_file("lora", key.removesuffix(".weight"), *weights[key].shape)
    dressed, _ = comfy.sd.load_lora_for_models(alone.model, None, lora, 0.8, 0)
    assert len(dressed.patches) == 3
    expected = alone.case.run(dressed)
    assert error_of(expected, alone.expected) > 1e-4, "the LoRA counts"
    for mode in (EXACT, "ulysses=2"):
        never = alone.on(pools, mode)
        error = error_of(alone.on(pools, mode, dressed), expected)
        log.info("%s with LoRA, %s: %.1e", alone.name, mode, error)
        assert error <= limit_of(mode, alone.case)
        assert error_of(alone.on(pools, mode), never) == 0, "off is as never"


def test_bfloat16(alone, pools):
    if alone.case.form:
        pytest.skip("a quantised model computes in what it was made for")
    half = alone.model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    expected = alone.case.run(half)
    modes = (EXACT, "ulysses=2", "pipe=2")
    errors = {mode: error_of(alone.on(pools, mode, half), expected) for mode in modes}
    rounding = error_of(expected, alone.expected)
    log.info("%s in bfloat16, itself %.1e from fp32: %s", alone.name, rounding, errors)
    assert errors[EXACT] == 0 and max(errors.values()) <= 1.5 * rounding, "as far apart as roundings can be"


def test_other_shifts_of_minimax_h3(alone, pools):
    """ModelSamplingMiniMaxH3: the sampler's schedule, and by which the model scales its sound in every step."""
    if alone.name != "minimax-h3":
        pytest.skip("a node of MiniMax-H3's")
    from comfy_extras.nodes_minimax_h3 import MiniMaxH3SigmaShift

    (shifted,) = MiniMaxH3SigmaShift.execute(alone.model, 9.0, 2.0).args
    expected = alone.case.run(shifted)
    assert error_of(expected, alone.expected) > 1e-3, "the node counts"
    for mode in ("1 rank", EXACT, "ulysses=2"):
        error = error_of(alone.on(pools, mode, shifted), expected)
        log.info("minimax-h3 with other shifts, %s: %.1e", mode, error)
        assert error <= (0 if mode == "1 rank" else limit_of(mode, alone.case))
