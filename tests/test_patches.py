"""Patches as algebra: what holds for every kind of adapter. The host tests compare numbers with ComfyUI."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Patch
from comfy_xdit.weights.fit import check_patch, fitting
from comfy_xdit.weights.patches import CHANGES, apply_patches

ROWS, COLUMNS, RANK = 24, 8, 3
KEY = "double_blocks.0.img_attn.qkv.weight"


def rand(*shape, seed=0):
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def values(kind, seed=0, dora=None):
    def r(*shape):
        nonlocal seed
        seed += 1
        return rand(*shape, seed=seed)

    return {
        "lora": lambda: [r(ROWS, RANK), r(RANK, COLUMNS), 2.0, None, dora, None],
        "loha": lambda: [
            r(ROWS, RANK),
            r(RANK, COLUMNS),
            2.0,
            r(ROWS, RANK),
            r(RANK, COLUMNS),
            None,
            None,
            dora,
        ],
        "lokr": lambda: [r(6, 2), None, 2.0, None, None, r(4, RANK), r(RANK, 4), None, dora],
        "glora": lambda: [r(COLUMNS, RANK), r(RANK, COLUMNS), r(ROWS, RANK), r(RANK, COLUMNS), 2.0, dora],
        "oft": lambda: [r(6, 4, 4), None, 0.5, dora],
        "boft": lambda: [r(2, 6, 4, 4), None, 0.5, dora],
        "diff": lambda: [r(ROWS, COLUMNS)],
        "set": lambda: [r(ROWS, COLUMNS)],
    }[kind]()


KINDS = [*CHANGES, "diff", "set"]


def patch(kind, strength=1.0, seed=0, dora=None, **more):
    return Patch(key=KEY, kind=kind, weights=values(kind, seed, dora), strength=strength, **more)


def applied(weight, *patches):
    return apply_patches(weight.clone(), list(patches))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_weight(kind):
    weight = rand(ROWS, COLUMNS)
    assert (applied(weight, patch(kind, 0.5)) - weight).abs().max() > 0.01


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("kind", [*CHANGES, "diff"])
def test_no_strength_no_change(kind, axis):
    weight = rand(ROWS, COLUMNS)
    dora = rand(ROWS, 1).abs() if axis == "rows" else rand(1, COLUMNS).abs()
    assert torch.allclose(applied(weight, patch(kind, 0.0)), weight, atol=1e-7)
    if kind in CHANGES:
        assert torch.allclose(applied(weight, patch(kind, 0.0, dora=dora)), weight, atol=1e-7)


@given(kind=st.sampled_from(["lora", "loha", "lokr", "diff"]), a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_additive_kinds_are_linear_in_strength(kind, a, b):
    weight = rand(ROWS, COLUMNS)
    both = applied(weight, patch(kind, a), patch(kind, b))
    assert torch.allclose(both, applied(weight, patch(kind, a + b)), atol=1e-5)
    assert torch.allclose(applied(weight, patch(kind, a), patch(kind, -a)), weight, atol=1e-5)


@given(
    first=st.sampled_from(["lora", "loha", "lokr", "diff"]), second=st.sampled_from(["lora", "loha", "lokr"])
)
def test_additive_kinds_commute(first, second):
    weight, a, b = rand(ROWS, COLUMNS), patch(first, 0.7), patch(second, -0.4, seed=9)
    assert torch.allclose(applied(weight, a, b), applied(weight, b, a), atol=1e-5)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS), start=st.integers(0, 20), strength=st.floats(-1, 1), model=st.floats(0, 2)
)
def test_an_offset_is_the_patch_of_a_part(kind, start, strength, model):
    weight = rand(ROWS + 20, COLUMNS)
    whole = patch(kind, strength, strength_model=model)
    part = patch(kind, strength, strength_model=model, offset=[0, start, ROWS])
    expected = weight.clone()
    expected[start : start + ROWS] = applied(weight[start : start + ROWS], whole)
    assert torch.allclose(applied(weight, part), expected, atol=1e-6)


def test_plain_lora_in_one_pass_equals_the_long_way():
    weight = rand(ROWS, COLUMNS)
    up, down, alpha = values("lora")[:3]
    expected = weight.double() + 0.7 * alpha / RANK * up.double() @ down.double()
    assert torch.allclose(applied(weight, patch("lora", 0.7)).double(), expected, atol=1e-6)
    swapped = applied(weight, patch("lora", 0.7, function="swap_scale_shift")) - weight
    assert torch.allclose(swapped.roll(ROWS // 2, 0), (expected - weight).float(), atol=1e-6)


def test_plain_lora_takes_no_second_weight():
    """In place: the tensor that comes back is the one that went in."""
    weight = rand(ROWS, COLUMNS)
    assert apply_patches(weight, [patch("lora"), patch("lora", 0.3, offset=[0, 0, ROWS])]) is weight


@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_rotations_keep_lengths(bound):
    weight = rand(ROWS, COLUMNS)
    for kind in ("oft", "boft"):
        adapter = patch(kind)
        adapter.weights[2] = bound
        turned = applied(weight, adapter)
        assert not torch.allclose(turned, weight, atol=1e-3)
        assert torch.allclose(turned.norm(dim=0), weight.norm(dim=0), atol=1e-5)


def test_dora_gives_each_row_its_length():
    weight = rand(ROWS, COLUMNS)
    nothing = patch("lora", dora=rand(ROWS, 1).abs() + 0.1)
    nothing.weights[0] = torch.zeros(ROWS, RANK)
    assert torch.allclose(applied(weight, nothing).norm(dim=1, keepdim=True), nothing.weights[4], atol=1e-5)
    columns = patch("lora", dora=rand(1, COLUMNS).abs() + 0.1)
    assert torch.allclose(applied(weight, columns).norm(dim=0, keepdim=True), columns.weights[4], atol=1e-5)


def test_set_replaces_what_came_before():
    weight = rand(ROWS, COLUMNS)
    after = applied(weight, patch("lora"), patch("set"), patch("diff", 2.0, seed=5))
    assert torch.allclose(after, values("set")[0] + 2 * values("diff", 5)[0])


def test_padding():
    weight = rand(ROWS, COLUMNS)
    larger = Patch(key=KEY, kind="diff", weights=[torch.zeros(26, 9), {"pad_weight": True}], strength=1.0)
    after = applied(weight, larger)
    assert torch.equal(after[:ROWS, :COLUMNS], weight) and after.sum().isclose(weight.sum(), atol=1e-5)
    lora = patch("lora")
    lora.weights[5] = [ROWS - 1, COLUMNS]
    with pytest.raises(ValueError, match=r"a patch wants a weight of \(24, 8\) padded to \(23, 8\)"):
        applied(weight, lora)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_left_out_and_named(kind):
    good = Patch(key=KEY, kind="diff", weights=[rand(10, 6)], strength=1.0)
    fit, [[key, why]] = fitting((10, 6), [good, patch(kind, 0.5), good])
    assert fit == [good, good] and key == KEY and why


def test_what_is_left_out_still_scales_the_weight_as_comfyui_does():
    weight = rand(10, 6)
    fit, misfits = fitting((10, 6), [patch("lora", 0.5, strength_model=0.25)])
    assert len(misfits) == 1 and torch.equal(applied(weight, *fit), 0.25 * weight)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_without_numbers_the_same_patches_fit_as_with_them(kind, data):
    sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])
    weights = [
        rand(*data.draw(st.lists(sizes, min_size=1, max_size=4), label="shape"))
        if isinstance(value, torch.Tensor) and data.draw(st.booleans(), label="another shape")
        else value
        for value in values(kind)
    ]
    shape = data.draw(st.sampled_from([(ROWS, COLUMNS), (COLUMNS, ROWS), (ROWS, COLUMNS, 1, 1), (ROWS,)]))
    one = Patch(key=KEY, kind=kind, weights=weights, strength=0.5)
    fit, misfits = fitting(shape, [one])
    assert (fit, len(misfits)) in (([one], 0), ([], 1))
    try:
        apply_patches(rand(*shape), [one])
        assert fit
    except (RuntimeError, IndexError):
        assert misfits


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_what_a_device_says_is_no_misfit(monkeypatch, error):
    """It was taken for one on the rank that it happened to, so that ranks differed under one name."""

    def fails(*args):
        raise error

    monkeypatch.setitem(CHANGES, "loha", fails)
    with pytest.raises(RuntimeError) as told:
        applied(rand(ROWS, COLUMNS), patch("loha"))
    assert told.value is error


def changed(kind, position, value):
    weights = values(kind)
    weights[position] = value
    return weights


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("lora", []),
        ("lora", values("lora")[:5]),
        ("lora", changed("lora", 0, None)),
        ("lora", changed("lora", 0, [1.0, 2.0])),
        ("lora", changed("lora", 1, torch.zeros(0, COLUMNS))),
        ("lora", changed("lora", 1, torch.zeros(RANK, COLUMNS, dtype=torch.int64))),
        ("lora", changed("lora", 1, torch.zeros(RANK, COLUMNS, dtype=torch.complex64))),
        ("lora", changed("lora", 2, float("nan"))),
        ("lora", changed("lora", 2, "4")),
        ("lora", changed("lora", 5, [float("nan"), 8])),
        ("lora", changed("lora", 5, [-1, 8])),
        ("lokr", changed("lokr", 0, None)),
        ("lokr", changed("lokr", 5, None)),
        ("oft", [None, None, None, None]),
        ("diff", [torch.zeros(ROWS, COLUMNS), {"pad_weight": "yes"}]),
        ("set", [None]),
    ],
)
def test_a_damaged_patch_is_a_sentence(kind, weights):
    """None of them may end in a fault, or on some ranks only."""
    with pytest.raises(InputError, match=KEY):
        check_patch(Patch(key=KEY, kind=kind, weights=weights, strength=1.0))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_a_number(strength):
    with pytest.raises(InputError, match="strength"):
        check_patch(patch("lora", strength))
    with pytest.raises(InputError, match="strength"):
        check_patch(patch("lora", strength_model=strength))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_patches_pass(kind):
    check_patch(patch(kind, dora=rand(ROWS, 1) if kind in CHANGES else None))
    check_patch(Patch(key=KEY, kind="diff", weights=[rand(26, 9), {"pad_weight": True}], strength=1.0))


@pytest.mark.parametrize("offset", [[], [0, 0], [2, 0, 1], [-1, 0, 1], [0, -1, 1], [0, 0, 0], [0, 20, 5], [1, 0, 9]])
def test_a_part_that_the_weight_has_not(offset):
    with pytest.raises(InputError, match="give \\[dim, first, number\\] within it"):
        fitting((ROWS, COLUMNS), [patch("lora", offset=offset)])


def test_unknown_words():
    with pytest.raises(ValueError, match=r"unknown kind of patch 'zip' for .*; known are lora, loha"):
        applied(rand(4, 4), Patch(key=KEY, kind="zip", weights=[], strength=1.0))
    with pytest.raises(ValueError, match="unknown function 'turn'"):
        applied(rand(4, 4), Patch(key=KEY, kind="set", weights=[rand(4, 4)], strength=1.0, function="turn"))
