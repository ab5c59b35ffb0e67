"""Jobs: toy modules on pipelines of stages."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from token_toys import GRID, JOINT, PAIR, WIDTH, AudioVideo, Cube, call, toy_model
from torch import nn

from comfy_xdit.parallel.tokens import TokenPlan

SEEDS = (3, 4)
"""Of what goes through the stages one after the other."""


class Line(nn.Module):
    """Tokens of a grid go through blocks that are themselves the modules that attend."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Cube(2), Cube(1), Cube(2)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x, pe, options=None):
        for block in self.blocks:
            x = block(x, pe, options)
        return self.head(x)


PLANS = {
    "joint": JOINT,
    "pair": PAIR,
    "grid": GRID,
    "line": TokenPlan(blocks=GRID.blocks[:1], attention={"blocks.*": GRID.attention["blocks.*"]}),
}


def arguments(toy, **sizes):
    """Random arguments of a toy's forward."""
    return call("grid" if toy == "line" else toy, **sizes)


def stageable(toy, dtype):
    """A toy whose blocks another stage can stand in for: they give their streams and nothing else."""
    torch.manual_seed(0)
    model = Line().double().eval().requires_grad_(False) if toy == "line" else toy_model(toy)
    model = model.to(dtype)
    for block in model.modules():
        if isinstance(block, AudioVideo):
            block.more = ()
    return model


def alone(toy, sizes, dtype):
    """What the toy gives on one rank, without any hook, for each seed."""
    model = stageable(toy, dtype)
    with torch.inference_mode():
        return torch.cat([model(**arguments(toy, seed=seed, dtype=dtype, **sizes)) for seed in SEEDS])


@contextlib.contextmanager
def on_stage(model, plan, degrees, ends, attend_of=lambda context: None):
    """The engine on the toy, of which this rank keeps its stage; the stage; and the job's context.

    ends: of the stages' blocks, numbered through all lists. attend_of(context): the attention.
    """
    from ranks import groups

    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.spec import ParallelSpec
    from comfy_xdit.parallel.stage import Stage
    from comfy_xdit.parallel.stages import keep_stage
    from comfy_xdit.parallel.whole_shaped import whole_shaped

    context = ParallelContext(ParallelSpec(**degrees), groups())
    place = context.axis("pipe").index
    keep_stage(model, plan, range((0, *ends)[place], ends[place]))
    stage = Stage(context)
    attend = attend_of(context)
    with torch.inference_mode(), whole_shaped(model, plan, context, attend, stage) as work:
        yield work, stage, context


def run_staged(toy, degrees, ends, sizes, like):
    """Job: what the toy gives for each seed, twice; how many bytes this rank passed on; and its share of the weights.

    like: a tensor like the output for all seeds.
    """
    from comfy_xdit.parallel.drained import one_after_another

    model, plan = stageable(toy, like.dtype), PLANS[toy]
    num_weights = sum(weight.numel() for weight in model.parameters())
    with on_stage(model, plan, degrees, ends) as (work, stage, context):
        calls = [arguments(toy, seed=seed, dtype=like.dtype, **sizes) for seed in SEEDS]
        runs = [partial(model, **named, options={"override": work.attend}) for named in calls]
        outs = one_after_another(stage, [runs, runs], [like, like])
    share = sum(weight.numel() for weight in model.parameters()) / num_weights
    return outs, context.traffic.bytes["p2p"], share


class Ends:
    """A stage without neighbours: it takes ones for what arrives, and keeps what it would send."""

    def __init__(self, *, is_first=True, is_last=False):
        self.is_first, self.is_last, self.ends, self.sent = is_first, is_last, not is_last, []

    def receive(self, like):
        return tuple(torch.ones_like(x) for x in like) if isinstance(like, tuple) else torch.ones_like(like)

    def leave(self, made):
        self.sent.append(made)
        if self.ends:
            raise Ended


class Ended(Exception):
    pass


@contextlib.contextmanager
def one_stage(model, plan, stage, ends):
    """In this process: the toy with a stage's blocks alone; yields the engine."""
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.groups import GroupCache
    from comfy_xdit.parallel.spec import ParallelSpec
    from comfy_xdit.parallel.stages import keep_stage
    from comfy_xdit.parallel.whole_shaped import whole_shaped

    keep_stage(model, plan, stage)
    context = ParallelContext(ParallelSpec(), GroupCache(1))
    with torch.inference_mode(), whole_shaped(model, plan, context, stage=ends) as work:
        yield work
