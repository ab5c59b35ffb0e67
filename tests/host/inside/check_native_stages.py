"""Stages of a model of ComfyUI's own class: each reads its own blocks' weights, and one after the other they are it."""

import logging

import comfy.sd
import native_models as make
import pytest
import torch
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.source import describe

from comfy_xdit.native.families.wan import WAN
from comfy_xdit.native.load import load
from comfy_xdit.native.resident import plain_tensors
from comfy_xdit.native.stage import keep_share
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.stages import block_paths
from comfy_xdit.parallel.whole_shaped import whole_shaped

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

FORMS = {
    "plain": [None],
    "fp8": ["float8_e4m3fn"],
    "nvfp4": ["nvfp4"],
    "mixed": ["float8_e4m3fn", "int8_tensorwise", None],
}


class Link:
    """One end of a stage that hands over to the next in this process."""

    def __init__(self, *, is_first, is_last, came=None):
        self.is_first, self.is_last, self.ends, self.came = is_first, is_last, not is_last, came

    def receive(self, like):
        assert like.shape == self.came.shape and like.isnan().all()
        return self.came

    def leave(self, made):
        self.came = made
        if self.ends:
            raise Ended


class Ended(Exception):
    pass


@pytest.fixture
def described(tmp_path, request):
    config = make.wan()
    plain = make.weights(config)
    state = make.quantised(plain, FORMS[request.param])
    path = make.save(tmp_path / "wan.safetensors", state)
    return str(path), describe(comfy.sd.load_diffusion_model(str(path))).source


@pytest.mark.parametrize("described", FORMS, indirect=True)
def test_two_stages_one_after_the_other_are_the_model(described, caplog):
    path, source = described
    came, held = None, []
    with torch.inference_mode():
        whole = load(path, source, torch.device("cpu")).model
        dtype = whole.get_dtype_inference()
        x, context = torch.randn(1, 16, 3, 8, 6).to(dtype), torch.randn(1, 9, 4096).to(dtype)
        call = {"x": x, "timestep": torch.tensor([700.0]), "context": context}
        expected = whole.diffusion_model(**call, transformer_options={})
        assert expected.isfinite().all() and expected.std() > 0
        for number in range(2):
            own = []

            def part(net, own=own, number=number):
                stage, mine = keep_share(net, WAN, ParallelSpec(pipe=2).weights_of(number))
                own.append(stage)
                return mine

            caplog.clear()
            with caplog.at_level(logging.WARNING):
                model = load(path, source, torch.device("cpu"), part).model
            assert not caplog.records
            net = model.diffusion_model
            paths = block_paths(net, WAN.plan)
            others = tuple(f"{path}." for block, path in enumerate(paths) if block not in own[0])
            assert not [key for key, _ in net.named_parameters() if key.startswith(others)]
            held.append(sum(part.nbytes for weight in net.parameters() for part in plain_tensors(weight)))
            link = Link(is_first=number == 0, is_last=number == 1, came=came)
            spec = ParallelContext(ParallelSpec(), GroupCache(1))
            with whole_shaped(net, WAN.plan, spec, stage=link):
                try:
                    out = net(**call, transformer_options={})
                except Ended:
                    came = link.came
        assert torch.equal(out, expected)
    all_bytes = sum(part.nbytes for weight in whole.diffusion_model.parameters() for part in plain_tensors(weight))
    blocks = whole.diffusion_model.blocks
    in_blocks = sum(part.nbytes for weight in blocks.parameters() for part in plain_tensors(weight))
    assert sum(held) == 2 * all_bytes - in_blocks
