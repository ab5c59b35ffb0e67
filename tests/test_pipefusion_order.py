"""When a stage posts its receives: after the launch of all that their senders need of it, and as early as that allows.

With NCCL a posted receive spins on the device until its sender comes, and whatever waits for the device meanwhile waits
with it. Were its sender to need what this rank has not launched yet, neither would go on.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from ranks import Ranks
from staged import PROGRAMS, run_pipefusion, sampling_job
from test_pipefusion import MODELS

from comfy_xdit.parallel import links
from comfy_xdit.parallel.pipefusion import _Pipeline
from comfy_xdit.parallel.pipeline_ends import FirstStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one forward computes. patch: None for all at once."""

    evaluation: int
    is_exact: bool
    patch: int | None


@dataclasses.dataclass
class Order:
    """What one rank did. before, back: of each receive of the stage before, and of the last stage, after how many
    forwards it was posted. replies: evaluation and patch of each message of the last stage.
    """

    forwards: list[Part] = dataclasses.field(default_factory=list)
    before: list[int] = dataclasses.field(default_factory=list)
    back: list[int] = dataclasses.field(default_factory=list)
    replies: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def order_of(**arguments: Any) -> Order:
    """Job: the order in which this rank does `run_pipefusion`."""
    order = Order()
    receives: dict[int, list[int]] = {}
    forward, expect, init, irecv = _Pipeline._forward, FirstStage.expect, links.Inbox.__init__, dist.irecv

    def launched(self, step, batch, patch):
        out = forward(self, step, batch, patch)
        part = Part(evaluation=step.evaluation.number, is_exact=step.evaluation.is_exact, patch=patch)
        order.forwards.append(part)
        return out

    def expected(self, evaluation):
        for patch, _ in enumerate(self._patches.rows):
            order.replies.extend((evaluation.number, patch) for _ in self._replies.to(evaluation))
        expect(self, evaluation)

    def made(self, axis, source):
        init(self, axis, source)
        receives[id(axis.group)] = order.back if axis.name == "pipe back" else order.before

    def posted(x, source, group):
        receives[id(group)].append(len(order.forwards))
        return irecv(x, source, group=group)

    with (
        mock.patch.object(_Pipeline, "_forward", launched),
        mock.patch.object(FirstStage, "expect", expected),
        mock.patch.object(links.Inbox, "__init__", made),
        mock.patch.object(dist, "irecv", posted),
    ):
        run_pipefusion(**arguments)
    return order


def needed_before(part: Part, other: Part) -> bool:
    """Whether the stage before cannot send `part` until this stage has launched `other`.

    A part enters the first stage with its replies, which went through all stages an evaluation ago, and after the parts
    that are before it there.
    """
    if other.evaluation == part.evaluation - 1:
        return part.is_exact or (part.patch is not None and (other.is_exact or other.patch == part.patch))
    return other.evaluation < part.evaluation


def needed_back(reply: tuple[int, int], other: Part) -> bool:
    """Whether the last stage cannot send what it made of a patch until the first has launched `other`."""
    evaluation, patch = reply
    return other.evaluation == evaluation and (other.is_exact or other.patch == patch)


def num_needed(needed: list[bool]) -> int:
    """How many forwards, from the first on, there are up to the last that is needed."""
    return max((number + 1 for number, is_needed in enumerate(needed) if is_needed), default=0)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    with Ranks(request.param) as started:
        yield started


@pytest.mark.parametrize(
    ("sampler", "method"),
    [
        ("euler", {"num_patches": 4}),
        ("multistep", {"num_patches": 1, "warmup_steps": 2}),
        ("two evaluations a step", {"num_patches": 3}),
        # Exact evaluations between the others.
        ("negative left out", {"num_patches": 2}),
    ],
)
@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_a_receive_is_posted_when_its_sender_needs_nothing_more_of_this_rank(ranks, kind, sampler, method) -> None:
    # Texts of two lengths: two batches.
    job = sampling_job(MODELS[kind], PROGRAMS[sampler](), texts=(5, 3))
    arguments = {"model": MODELS[kind], "job": job, "degrees": {"pipe": ranks.num_ranks}, **method}
    orders = ranks.run("run_of", module="test_pipefusion_order", function="order_of", arguments=arguments)
    for stage, order in enumerate(orders):
        assert len(order.before) == (len(order.forwards) if stage else 0)
        assert len(order.back) == (0 if stage else len(order.replies)) and (stage or order.back)
        for part, num_launched in zip(order.forwards, order.before, strict=False):
            needed = num_needed([needed_before(part, other) for other in order.forwards])
            assert num_launched >= needed, f"stage {stage}: {part} is received too early"
        for reply, num_launched in zip(order.replies, order.back, strict=False):
            needed = num_needed([needed_back(reply, other) for other in order.forwards])
            assert num_launched >= needed, f"what becomes of {reply} is received too early"
        # A segment's message comes while the one before it is computed.
        pairs = zip(order.forwards, order.forwards[1:], order.before[1:], strict=False)
        for number, (previous, part, num_launched) in enumerate(pairs):
            is_segment = not part.is_exact and previous.evaluation == part.evaluation
            assert not is_segment or num_launched <= number, f"stage {stage}: {part} is received too late"
