"""Families of ComfyUI's own classes: each plan equals one rank on this ComfyUI; what a family names was tried."""

import inspect
import logging

import comfyui_version
import pytest
import torch
from comfy_xdit_nodes.native.options import use_comfy

from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.selftest import run, selftest, verdict
from comfy_xdit.native.subject import build, exists
from comfy_xdit.native.subjects import SUBJECTS

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

KNOWN = {name: family for name, family in FAMILIES.items() if any(exists(kind) for kind in family.kinds)}


@pytest.fixture(autouse=True)
def torchs_attention(monkeypatch):
    """PixArt can be run in parallel where its attention is torch's, as on a GPU; here ComfyUI would choose another."""
    import comfy.ldm.pixart.blocks
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr(comfy.ldm.pixart.blocks, "optimized_attention", attention_pytorch)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_holds(name):
    outcomes = selftest(KNOWN[name], SUBJECTS[name])
    assert outcomes and not verdict(KNOWN[name], outcomes, comfyui_version.__version__)
    log.info("%s: %d calls, worst %.1e", name, len(outcomes), max(outcome.error for outcome in outcomes))


def arguments(model, call):
    """Names of what reaches the transformer's innermost forward, beside x, the timestep and the options."""
    name = "_forward" if hasattr(model, "_forward") else "forward"
    inner, found = getattr(model, name), set()

    def noted(*args, **kwargs):
        given = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        named = list(given)[2:]
        found.update(name for name in named if given[name] is not None and name != "transformer_options")
        return inner(*args, **kwargs)

    setattr(model, name, noted)
    try:
        with torch.inference_mode():
            run(model, call)
    finally:
        delattr(model, name)
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_family_names_is_what_was_tried(name):
    """Whatever reaches the transformer is named, and whatever is named was there in a call."""
    family, named, options = KNOWN[name], set(), set()
    for subject in SUBJECTS[name]:
        if not exists(subject.kind):
            continue
        config = subject.configured()
        model = build(subject.kind, config)
        for call in subject.calls(config).values():
            named |= arguments(model, call)
            options |= call.get("transformer_options", {}).keys()
    assert named == set(family.rows) | set(family.constants)
    assert options == set(family.options)
