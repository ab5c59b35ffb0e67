"""ComfyUI's own classes, cut over GPUs that aren't there: what CUDA and NCCL would refuse, wait for, or hang at.

As tests/test_cuda_whole_shaped.py, with the real classes, and every call that the self-test makes.
"""

import copy
import logging
import sys
from collections import Counter
from pathlib import Path

import comfy.model_management
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from comfy_xdit_nodes.native.options import use_comfy
from events import Wait
from nccl_sim import brief, differences, stuck
from pretend_cuda import pretending

from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.selftest import run
from comfy_xdit.native.subject import build, cases, exists
from comfy_xdit.native.subjects import SUBJECTS
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.whole_shaped import whole_shaped

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

OF_NUMBERS = ("nonzero", "a write at places that a tensor names")
"""What a pretended device can't do: it has no numbers."""

SPECS = [ParallelSpec(ulysses=2), ParallelSpec(ring=2)]


@pytest.fixture(autouse=True)
def much_memory(monkeypatch):
    """ComfyUI's attention asks how much there is."""

    def free(device=None, torch_free_too=False):
        return (1e12, 1e12) if torch_free_too else 1e12

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)


def on_card(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(on_card(item, device) for item in value)
    if isinstance(value, dict):
        return {name: on_card(item, device) for name, item in value.items()}
    return value


def play(model, call, spec, plan, rank):
    """The events of one evaluation on a rank; plan None for the model by itself."""
    with pretending(rank, spec.num_ranks) as device, torch.inference_mode():
        model = copy.deepcopy(model)
        for part in model.modules():
            for kept in (part._parameters, part._buffers):
                for name, weight in kept.items():
                    if weight is not None:
                        moved = weight.data.to(device.device)
                        is_weight = kept is part._parameters
                        kept[name] = torch.nn.Parameter(moved, requires_grad=False) if is_weight else moved
        given = on_card(copy.deepcopy(call), device.device)
        if plan is None:
            run(model, given)
            return list(device.events)
        groups = GroupCache(spec.num_ranks, num_local=spec.num_ranks)
        with ParallelContext(spec, groups) as context, whole_shaped(model, plan, context) as work:
            run(work.module, given)
        return list(device.events)


def waits(events):
    return Counter(f"{event.what} in {event.where}" for event in events if isinstance(event, Wait))


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_calls_are_ones_that_cuda_and_nccl_take(name):
    family, num = FAMILIES[name], 0
    for subject, config in cases(SUBJECTS[name]):
        if not exists(subject.kind):
            continue
        model = build(subject.kind, config)
        for title, call in subject.calls(config).items():
            try:
                alone = waits(play(model, call, ParallelSpec(), None, 0))
            except (NotImplementedError, AssertionError) as error:
                if not any(words in str(error) for words in OF_NUMBERS):
                    raise
                log.info("%s %s: left out, its shapes are known by numbers only", subject.kind, title)
                continue
            for spec in SPECS:
                played = [play(model, call, spec, family.plan, rank) for rank in range(2)]
                assert not differences(played), f"{subject.kind} {title} on {spec}"
                assert not stuck([brief(events) for events in played]), f"{subject.kind} {title} on {spec}"
                for events in played:
                    more = waits(events) - alone
                    assert more.total() <= 1, f"{subject.kind} {title} on {spec}: {more}"
                num += 1
    if not num:
        pytest.skip("this ComfyUI has none of its kinds, or its own code looks at numbers in every call")
