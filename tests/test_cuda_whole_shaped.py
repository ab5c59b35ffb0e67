"""The engine of whole-shaped shards on GPUs that aren't there: what CUDA and NCCL would refuse, wait for, or hang at.

As `test_cuda_paths.py`, with toy models in place of ComfyUI's own classes: what is asked is the engine's.
"""

import pytest
import torch
from cuda_checks import hangs
from events import Wait
from nccl_sim import differences
from pretend_cuda import pretending
from rehearsal import Played
from token_toys import TOYS, Compressed, call, toy_model

from comfy_xdit.messages import Result
from comfy_xdit.parallel.attention import SequenceAttention
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.distri import DistriKeys
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.token_shards import TokenShards
from comfy_xdit.parallel.whole_shaped import whole_shaped

SPECS = [{"ulysses": 2}, {"ring": 2}, {"ring": 3}, {"distri": 2}, {"ulysses": 2, "ring": 2}, {"distri": 2, "ring": 2}]
EVALUATIONS = 3


def on_card(value, device):
    if isinstance(value, torch.Tensor):
        kept = value.to(torch.bfloat16) if value.is_floating_point() else value
        return kept.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(on_card(item, device) for item in value)
    return Compressed(on_card(value.x, device), value.num) if isinstance(value, Compressed) else value


def play(toy, degrees, rank):
    spec = ParallelSpec(**degrees)
    with pretending(rank, spec.num_ranks) as device, torch.inference_mode():
        model = toy_model(toy)
        for part in model.modules():
            for name, weight in part._parameters.items():
                part._parameters[name] = torch.nn.Parameter(on_card(weight, device.device), requires_grad=False)
        given = {name: on_card(value, device.device) for name, value in call(toy).items()}
        groups = GroupCache(spec.num_ranks, num_local=spec.num_ranks)
        with ParallelContext(spec, groups) as context:
            loaded = list(device.events)
            keys = DistriKeys(context.axis("distri"), [(0,)] * EVALUATIONS, warmup_steps=1, stale=True)
            with keys, whole_shaped(model, TOYS[toy][1], context, SequenceAttention(context, keys)) as work:
                for number in range(EVALUATIONS):
                    keys.begin(number)
                    model(**given, options={"override": work.attend})
        return Played(loaded=loaded, ran=device.events[len(loaded) :], answer=Result())


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("degrees", SPECS, ids=str)
def test_a_run_is_one_that_cuda_and_nccl_take(toy, degrees):
    played = [play(toy, degrees, rank) for rank in range(ParallelSpec(**degrees).num_ranks)]
    assert not differences([[*one.loaded, *one.ran] for one in played])
    assert not hangs(played)
    for one in played:
        # Once a job, to set its clock; not once an evaluation.
        assert [event.what for event in one.ran if isinstance(event, Wait)] == ["Stream.synchronize"]


def test_a_wait_in_a_block_is_seen(monkeypatch):
    narrow = TokenShards.narrow

    def and_looks(shards, value, rule):
        found = narrow(shards, value, rule)
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            found.sum().item()
        return found

    monkeypatch.setattr(TokenShards, "narrow", and_looks)
    with pytest.raises(AssertionError, match=r"Stream\.synchronize"):
        test_a_run_is_one_that_cuda_and_nccl_take("grid", {"ulysses": 2})
