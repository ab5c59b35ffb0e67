"""How PipeFusion has a model compute a patch of its tokens: by the engine of whole-shaped shards."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol, cast

from torch import nn

from comfy_xdit.errors import InputError

from .context import ParallelContext
from .latent_tokens import Grid, LatentTokens, StreamSizes
from .model import Call, Model
from .once import OncePerEvaluation
from .patch_tokens import PatchTokens
from .pipeline_ends import Evaluation, LatentPatches
from .sharded import sharded
from .stage import Stage
from .stale import StaleAttention
from .token_shards import TokenShards
from .whole_shaped import WholeShaped, whole_shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How a call's tokens are cut. sizes: None where only a forward knows."""

    patches: list[PatchTokens]
    sizes: StreamSizes | None


class PatchFamily(Protocol):
    """A family whose latents can be cut into patches."""

    def latent_tokens(self, module: nn.Module, call: Call) -> LatentTokens | None:
        """Where the latent's tokens stand; None where it can't be cut."""

    def stream_sizes(self, module: nn.Module, call: Call) -> StreamSizes | None:
        """What the call makes of the streams; None where only a forward knows."""


def has_patches(model: Model, calls: Sequence[Call]) -> bool:
    """Whether the latent of these calls, which are for one latent, can be cut into patches."""
    family = cast("PatchFamily", model.family)
    return all(family.latent_tokens(model.module, call) is not None for call in calls)


def latent_of(model: Model, call: Call) -> LatentTokens:
    """Where the latent's tokens stand. Raises InputError where it can't be cut."""
    latent = cast("PatchFamily", model.family).latent_tokens(model.module, call)
    if latent is None:
        raise InputError(f"{model.family.title} cannot be cut into patches for this workflow; use pipe=1")
    return latent


@contextlib.contextmanager
def patch_engine(model: Model, call: Call, context: ParallelContext, keys: StaleAttention) -> Iterator[PatchEngine]:
    """The engine for `model`, which is cut into stages and attends by `keys` inside of the `with`.

    call: one of the job's, which are for one latent. Raises InputError where it can't be cut into patches.
    """
    module, plan, stage, grid = model.module, model.family.plan, Stage(context), latent_of(model, call).grid
    with (
        OncePerEvaluation(module, plan) as once,
        sharded(module, plan.tensor, context.axis("tensor")),
        whole_shaped(module, plan, context, keys, stage) as work,
    ):
        yield PatchEngine(model, work, once, stage, grid)


class PatchEngine:
    """A model that computes patches, on the stage `stage`. grid: the latent's tokens."""

    def __init__(self, model: Model, work: WholeShaped, once: OncePerEvaluation, stage: Stage, grid: Grid) -> None:
        self.stage, self.grid = stage, grid
        self._model, self._work, self._once = model, work, once

    def cut(self, call: Call, patches: LatentPatches) -> Cut:
        """Raises InputError where the call's tokens can't be cut."""
        latent, rows = latent_of(self._model, call), patches.rows
        assert latent.grid == self.grid, f"{latent} for {self.grid}"
        sizes = cast("PatchFamily", self._model.family).stream_sizes(self._model.module, call)
        parts = [PatchTokens(number=each, num=len(rows), rows=rows[each], latent=latent) for each in range(len(rows))]
        return Cut(patches=parts, sizes=sizes)

    def numel(self, cut: Cut, patch: int | None, num_rows: int) -> int | None:
        """Of the message that this rank takes for a patch, or for all tokens; None where only the forward knows."""
        if cut.sizes is None:
            return None
        part, lengths = None if patch is None else cut.patches[patch], cut.sizes.lengths
        shards = TokenShards(axis=self._work.axis, patch=part, lengths=dict(lengths))
        if shards.short is not None:
            shards.axis = self._work.axis.alone
        return num_rows * cut.sizes.width * sum(shards.own(tuple(lengths)))

    def begin(self, evaluation: Evaluation, rows: Hashable, cut: Cut, patch: int | None) -> None:
        """What follows computes a patch, or all tokens, of these rows in this evaluation."""
        self._once.begin(evaluation.number, rows)
        self._work.patch = None if patch is None else cut.patches[patch]
        # Where no keys are kept, the model's own attention is used: it then rounds as on one rank.
        self._work.sees_all = evaluation.keeps or not evaluation.is_exact

    def settle(self) -> None:
        """All evaluations are done; raises RuntimeError where something did not stand for what it should."""
        self._once.settle()
