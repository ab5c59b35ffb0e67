"""Our patch arithmetic against ComfyUI's own, on random adapters of every kind."""

from types import SimpleNamespace

import comfy.lora
import comfy.utils
import comfy.weight_adapter as adapters
import pytest
import torch

from comfy_xdit.messages import Patch
from comfy_xdit.weights.fit import fitting
from comfy_xdit.weights.patches import apply_patches

BOFT = adapters.BOFTAdapter
KINDS = {cls.name: cls for cls in (*adapters.adapters, BOFT)}
LINEAR, CONV, SQUARE = (24, 16), (24, 16, 3, 3), (16, 16)


def rand(*shape):
    return torch.randn(shape) * 0.3


def lokr(*, w1=None, w2=None, alpha=None, a1=None, b1=None, a2=None, b2=None, core=None, dora=None):
    return [w1, w2, alpha, a1, b1, a2, b2, core, dora]


def rows(shape):
    return rand(shape[0], *[1] * (len(shape) - 1)).abs()


def columns(shape):
    return rand(1, shape[1], *[1] * (len(shape) - 2)).abs()


def cases():
    """(name, kind, weight shape, adapter's values)."""
    yield "lora", "lora", LINEAR, [rand(24, 4), rand(4, 16), 3.0, None, None, None]
    yield "no alpha", "lora", LINEAR, [rand(24, 4), rand(4, 16), None, None, None, None]
    yield "dora rows", "lora", LINEAR, [rand(24, 4), rand(4, 16), 2.0, None, rows(LINEAR), None]
    yield "dora columns", "lora", LINEAR, [rand(24, 4), rand(4, 16), 2.0, None, columns(LINEAR), None]
    yield "half", "lora", LINEAR, [rand(24, 4).half(), rand(4, 16).bfloat16(), 3.0, None, None, None]
    yield "reshape", "lora", (24, 12), [rand(24, 4), rand(4, 16), 3.0, None, None, [24, 16]]
    yield "conv", "lora", CONV, [rand(24, 4, 1, 1), rand(4, 16, 3, 3), 3.0, None, None, None]
    yield "conv mid", "lora", CONV, [rand(24, 4, 1, 1), rand(4, 16, 1, 1), 3.0, rand(4, 4, 3, 3), None, None]
    yield "conv dora", "lora", CONV, [rand(24, 4, 1, 1), rand(4, 16, 3, 3), 3.0, None, columns(CONV), None]
    pair = [rand(24, 4), rand(4, 16), 2.0, rand(24, 4), rand(4, 16)]
    yield "loha", "loha", LINEAR, [*pair, None, None, None]
    yield "loha dora", "loha", LINEAR, [*pair, None, None, rows(LINEAR)]
    cores = [rand(4, 4, 3, 3), rand(4, 4, 3, 3)]
    yield "loha tucker", "loha", CONV, [rand(4, 24), rand(4, 16), 2.0, rand(4, 24), rand(4, 16), *cores, None]
    yield "lokr", "lokr", LINEAR, lokr(w1=rand(4, 4), w2=rand(6, 4), alpha=2.0)
    yield "lokr w2", "lokr", LINEAR, lokr(w1=rand(4, 4), a2=rand(6, 2), b2=rand(2, 4), alpha=3.0)
    yield "lokr w1", "lokr", LINEAR, lokr(a1=rand(4, 3), b1=rand(3, 4), w2=rand(6, 4), alpha=2.0)
    both = {"a1": rand(4, 3), "b1": rand(3, 4), "a2": rand(6, 2), "b2": rand(2, 4), "alpha": 5.0}
    yield "lokr both", "lokr", LINEAR, lokr(**both)
    yield "lokr dora", "lokr", LINEAR, lokr(**both, dora=columns(LINEAR))
    tucker = {"w1": rand(4, 4), "a2": rand(2, 6), "b2": rand(2, 4), "core": rand(2, 2, 3, 3), "alpha": 1.5}
    yield "lokr tucker", "lokr", CONV, lokr(**tucker)
    yield "lokr conv", "lokr", CONV, lokr(w1=rand(4, 4), w2=rand(6, 4, 3, 3))
    old = [rand(4, 16), rand(16, 4), rand(4, 16), rand(24, 4)]
    new = [rand(16, 4), rand(4, 16), rand(24, 4), rand(4, 16)]
    yield "glora old", "glora", LINEAR, [*old, 3.0, None]
    yield "glora new", "glora", LINEAR, [*new, 3.0, None]
    yield "glora dora", "glora", LINEAR, [*new, None, rows(LINEAR)]
    yield "glora either", "glora", SQUARE, [*(rand(16, 16) for _ in range(4)), 3.0, None]
    yield "glora conv", "glora", CONV, [rand(16, 4), rand(4, 16), rand(24, 4), rand(4, 16, 3, 3), 3.0, None]
    yield "oft", "oft", LINEAR, [rand(6, 4, 4), None, None, None]
    yield "oft bound", "oft", LINEAR, [rand(6, 4, 4), None, 0.5, None]
    yield "oft dora", "oft", LINEAR, [rand(6, 4, 4), None, 0.5, rows(LINEAR)]
    yield "oft conv", "oft", CONV, [rand(6, 4, 4), None, 0.0, None]
    yield "boft", "boft", LINEAR, [rand(2, 6, 4, 4), None, 0.0, None]
    yield "boft bound", "boft", LINEAR, [rand(2, 6, 4, 4), rand(24, 1), 0.5, None]
    yield "boft dora", "boft", LINEAR, [rand(2, 6, 4, 4), None, 0.5, columns(LINEAR)]
    yield "boft without alpha", "boft", LINEAR, [rand(2, 6, 4, 4), None, None, None]
    yield "diff", "diff", LINEAR, [rand(24, 16)]
    yield "diff padded", "diff", (24, 12), [rand(26, 16), {"pad_weight": True}]
    yield "set", "set", LINEAR, [rand(24, 16)]


torch.manual_seed(0)
CASES = {name: rest for name, *rest in cases()}


def theirs(weight, patches):
    """ComfyUI's result for our patches."""
    listed = []
    for p in patches:
        values = tuple(p.weights)
        value = KINDS[p.kind](set(), values) if p.kind in KINDS else (p.kind, values)
        function = comfy.utils.swap_scale_shift if p.function else None
        listed.append((p.strength, value, p.strength_model, tuple(p.offset) if p.offset else None, function))
    return comfy.lora.calculate_weight(listed, weight.clone(), "key.weight")


def compare(weight, *patches):
    expected = theirs(weight, patches)
    fit, _ = fitting(weight.shape, list(patches))
    result = apply_patches(weight.clone(), fit)
    assert result.shape == expected.shape
    assert (result - expected).norm() <= 1e-6 * expected.norm()
    return SimpleNamespace(result=result, expected=expected)


def patch(name, **changes):
    kind, _, values = CASES[name]
    return Patch(**{"key": "key.weight", "kind": kind, "weights": values, "strength": 1.0, **changes})


@pytest.mark.parametrize("strength", [1.0, 0.7, -1.3, 0.0])
@pytest.mark.parametrize("name", [name for name in CASES if name != "lokr tucker"])
def test_kind(name, strength):
    weight = rand(*CASES[name][1])
    got = compare(weight, patch(name, strength=strength))
    if strength == 1.0 and name not in ("boft without alpha", "oft dora"):
        assert got.result.shape != weight.shape or not torch.equal(got.result, weight)


def test_lokr_tucker(monkeypatch):
    """Some versions of torch refuse the strides in kron, and ComfyUI then leaves the patch out; we do not."""
    kron = torch.kron
    monkeypatch.setattr(torch, "kron", lambda a, b: kron(a, b.contiguous()))
    weight = rand(*CONV)
    assert not torch.equal(compare(weight, patch("lokr tucker", strength=0.7)).result, weight)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] == LINEAR])
def test_offset_strength_model_and_function(name):
    part = {"strength": 0.6, "offset": [0, 24, 24], "strength_model": 0.8}
    compare(rand(72, 16), patch(name, **part))
    if CASES[name][0] != "set":
        compare(rand(72, 16), patch(name, **part, function="swap_scale_shift"))


@pytest.mark.parametrize("name", ["lora", "diff", "loha", "set"])
def test_offset_of_columns(name):
    compare(rand(24, 48), patch(name, offset=[1, 16, 16], strength=0.5))


def test_several_in_order():
    names = ("lora", "dora rows", "oft bound", "lokr both", "set", "boft bound", "glora new", "diff")
    compare(rand(*LINEAR), *(patch(name, strength=0.2 * i - 0.5) for i, name in enumerate(names)))


def test_what_does_not_fit_is_left_out():
    compare(rand(10, 16), patch("lora"), patch("loha"), patch("lokr"), patch("diff"))
