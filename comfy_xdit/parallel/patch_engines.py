"""How PipeFusion has a model compute a part of its tokens: a diffusers model, or any module with a `TokenPlan`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from comfy_xdit.errors import InputError

from .apply import Application, applied
from .context import ParallelContext
from .latent_tokens import Grid, LatentTokens
from .model import Call, Model
from .once import OncePerEvaluation
from .patch_tokens import PatchTokens
from .patches import Evaluation, Patches
from .plan import ModelPlan
from .segments import Segment, segments_of
from .sequence import shard_sizes
from .sharded import sharded
from .stage import PipelineModel, Stage
from .stale import StaleAttention
from .whole_shaped import WholeShaped, whole_shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How a call's tokens are cut.

    segments: of an evaluation that isn't exact, in order. choose(segment): forwards compute it from now on.
    numel(segment, rows): of the message that a rank takes for it; None where only the forward knows.
    """

    segments: list[Segment]
    choose: Callable[[Segment], None]
    numel: Callable[[Segment, int], int | None]


class PatchEngine(Protocol):
    """A model that computes segments, on the stage `stage`.

    grid: the latent's tokens. texts_first: what conditions the image has segments of its own.
    """

    stage: Stage
    grid: Grid
    texts_first: bool

    def cut(self, call: Call, patches: Patches) -> Cut:
        """Raises InputError where the call's tokens can't be cut."""

    def begin(self, evaluation: Evaluation, rows: Hashable) -> None:
        """What follows computes these rows in this evaluation."""

    def settle(self) -> None:
        """All evaluations are done; raises RuntimeError where something did not stand for what it should."""


class PatchFamily(Protocol):
    """A family with a `TokenPlan` whose latents can be cut into patches."""

    def latent_tokens(self, module: nn.Module, call: Call) -> LatentTokens | None:
        """Where the latent's tokens stand; None where it can't be cut."""


def has_patches(model: Model, calls: Sequence[Call]) -> bool:
    """Whether the latent of these calls, which are for one latent, can be cut into patches."""
    if isinstance(model.family.plan, ModelPlan):
        return True
    family = cast("PatchFamily", model.family)
    return all(family.latent_tokens(model.module, call) is not None for call in calls)


@contextlib.contextmanager
def patch_engine(model: Model, call: Call, context: ParallelContext, keys: StaleAttention) -> Iterator[PatchEngine]:
    """The engine for `model`, which is cut into stages and attends by `keys` inside of the `with`.

    call: one of the job's, which are for one latent. Raises InputError where it can't be cut into patches.
    """
    plan, stage = model.family.plan, Stage(context)
    if isinstance(plan, ModelPlan):
        known, once = cast("PipelineModel", model), OncePerEvaluation(model.module, plan)
        blocks = [known.module.get_submodule(path) for path in known.block_paths]
        grid = Grid.of(call["x"].shape[2:], plan.token_side)
        with once, applied(model.module, plan, context, keys) as run, stage.between(blocks, known.stage):
            yield _Diffusers(known, context, run, once, stage, grid)
    else:
        grid = latent_of(model, call).grid
        shards = sharded(model.module, plan.tensor, context.axis("tensor"))
        with shards, whole_shaped(model.module, plan, context, keys, stage) as work:
            yield _Planned(model, work, stage, grid)


def latent_of(model: Model, call: Call) -> LatentTokens:
    """Where the latent's tokens stand. Raises InputError where it can't be cut."""
    latent = cast("PatchFamily", model.family).latent_tokens(model.module, call)
    if latent is None:
        raise InputError(f"{model.family.title} cannot be cut into patches for this workflow; use pipe=1")
    return latent


class _Diffusers:
    texts_first = True

    def __init__(
        self,
        model: PipelineModel,
        context: ParallelContext,
        run: Application,
        once: OncePerEvaluation,
        stage: Stage,
        grid: Grid,
    ) -> None:
        self.stage, self.grid = stage, grid
        self._model, self._shards, self._run, self._once = model, context.axis("sequence"), run, once

    def cut(self, call: Call, patches: Patches) -> Cut:
        lengths = self._lengths(call)
        config: Any = self._model.module.config
        hidden = config["num_attention_heads"] * config["attention_head_dim"]

        def choose(segment: Segment) -> None:
            self._run.segment = segment.spans

        def numel(segment: Segment, rows: int) -> int:
            sizes = [size for _, size in segment.spans.values()] if segment.spans else lengths.values()
            return rows * hidden * sum(shard_sizes(size, self._shards.degree)[self._shards.index] for size in sizes)

        segments = segments_of(self.grid, patches.rows, lengths, num_shards=self._shards.degree)
        return Cut(segments=segments, choose=choose, numel=numel)

    def _lengths(self, call: Call) -> dict[str, int]:
        """Tokens of each stream; the image's own where the model makes them inside."""
        family, lengths = self._model.family, {"image": self.grid.num_tokens}
        arguments = family.arguments(self._model, call)
        for name, rule in family.plan.cut_arguments.items():
            if isinstance(arguments.get(name), Tensor):
                lengths[rule.stream] = arguments[name].shape[rule.dim]
        return lengths

    def begin(self, evaluation: Evaluation, rows: Hashable) -> None:
        self._once.begin(evaluation.number, rows)

    def settle(self) -> None:
        self._once.settle()


class _Planned:
    texts_first = False

    def __init__(self, model: Model, work: WholeShaped, stage: Stage, grid: Grid) -> None:
        self.stage, self.grid = stage, grid
        self._model, self._work = model, work

    def cut(self, call: Call, patches: Patches) -> Cut:
        latent, rows = latent_of(self._model, call), patches.rows
        assert latent.grid == self.grid, f"{latent} for {self.grid}"

        def choose(segment: Segment) -> None:
            number = segment.patch
            self._work.patch = None
            if number is not None:
                self._work.patch = PatchTokens(number=number, num=len(rows), rows=rows[number], latent=latent)

        segments = [Segment(spans=None, patch=number) for number, _ in enumerate(rows)]
        return Cut(segments=segments, choose=choose, numel=lambda segment, rows: None)

    def begin(self, evaluation: Evaluation, rows: Hashable) -> None:
        # Where no keys are kept, the model's own attention is used: it then rounds as on one rank.
        self._work.sees_all = evaluation.keeps or not evaluation.is_exact

    def settle(self) -> None:
        pass
