"""Sampling through a pipeline of stages that never runs empty: PipeFusion.

Each stage computes patch after patch of the latent, with a part of the text, and passes it on (`patch_engine.py`);
when a patch leaves the last stage, its part of the sampler's step is made there, and it enters the first stage again
while the other patches are still under way. Attention sees old keys and values of what has not come by yet
(`stale.py`), so the result is an approximation, but one that does not depend on the number of stages.
Source: PipeFusion, arXiv 2405.14430.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.trajectory import SamplerProgram

from .agreement import Agreement
from .context import ParallelContext
from .denoise import Piece, deal
from .job import SamplingJob
from .links import Inbox, Outbox, Shelf
from .model import Call, Family, Model, calls_argument
from .patch_engine import Cut, PatchEngine, patch_engine
from .pipeline_ends import Evaluation, FirstStage, LastStage, LatentPatches, Replies
from .spec import check
from .stale import StaleAttention

LAG = 2
"""Evaluations between a wish to stop and the last one: no stage is further ahead of another than one."""

Post = Callable[[dict[str, Any]], None]
Kind = tuple[int, ...]
"""The conditionings of an evaluation."""


def pipefusion(
    model: Model,
    job: SamplingJob,
    conds: list[Call],
    context: ParallelContext,
    *,
    post: Post,
    wish_to_stop: Callable[[], bool],
) -> tuple[Tensor | None, dict[str, Any]]:
    """As `sample.sample`, approximately: the first `warmup_steps` evaluations, one at least, are exact.

    An evaluation with conditionings that no earlier one had is exact too. A job stops up to three evaluations
    after the wish. report: also num_patches, and buffer_bytes, what the buffers of keys and values took.
    """
    faults = check(context.spec, num_ranks=context.world_size, shape=model.shape)
    if faults:
        raise InputError("; ".join(faults))
    result, call = None, calls_argument(job.noise, 0.0, conds[0], model)
    with StaleAttention(context) as keys, patch_engine(model, call, context, keys) as engine:
        patches = LatentPatches.of(job, engine.grid, context)
        report: dict[str, Any] = {"num_patches": len(patches.rows)}
        pipeline = _Pipeline(model, job, conds, context, patches, keys, engine, post)
        if Agreement(wish_to_stop, context.world).go_on():
            result = pipeline.run(wish_to_stop)
            engine.settle()
        report["buffer_bytes"] = keys.most_bytes_held
    return result, {**context.report(), **report}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows that go through the model together.

    key: names their buffers, which are for `num_rows`, these from `first` on; cut: of a step that isn't exact.
    timesteps: the arguments that are the timestep.
    """

    key: tuple[Kind, int]
    pieces: list[Piece]
    call: Call
    cut: Cut
    first: int
    num_rows: int
    timesteps: list[str]

    def apart(self, family: Family) -> list[_Batch]:
        """Each row by itself."""
        places = [(piece.call, row) for piece in self.pieces for row in range(piece.start, piece.stop)]
        return [
            dataclasses.replace(
                self,
                pieces=[Piece(call=call, start=row, stop=row + 1)],
                call=family.of_rows(self.call, range(number, number + 1)),
                first=number,
            )
            for number, (call, row) in enumerate(places)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """What a stage computes without a look at the sampler: before it `patches` are fetched, then they are done.

    computed: batches, and which patch of them, None for all. begins: it is its evaluation's first.
    """

    evaluation: Evaluation
    patches: tuple[int, ...]
    computed: Sequence[tuple[_Batch, int | None]]
    begins: bool


class _Pipeline:
    """One stage's part of one job."""

    def __init__(
        self,
        model: Model,
        job: SamplingJob,
        conds: list[Call],
        context: ParallelContext,
        patches: LatentPatches,
        keys: StaleAttention,
        engine: PatchEngine,
        post: Post,
    ) -> None:
        self._model, self._job, self._conds, self._context = model, job, conds, context
        self._patches, self._keys, self._engine = patches, keys, engine
        self._stage = stage = engine.stage
        self._program: SamplerProgram = job.program
        replies, back = Replies.of(model, job, context), context.axis("pipe back")
        alone = Shelf() if back.degree == 1 else None
        self._sent = (alone or Outbox(back, 0)) if stage.is_last else None
        self._last = None
        if self._sent is not None:
            channels = model.family.output_shape(model, {"x": job.noise})[1]
            self._last = LastStage(job, patches, replies, self._sent, context, channels)
        self._first = None
        if stage.is_first:
            link = alone or Inbox(back, back.degree - 1)
            self._first = FirstStage(job, patches, replies, link, post)
        # Of all conditionings, also of other lanes: a fault that only some ranks see leaves the others waiting.
        self._kinds = [tuple(call.conds) for call in self._program.calls]
        every = {index: _whole_rows(job, (index,)) for kind in self._kinds for index in kind}
        for index, pieces in every.items():
            self._batch((index,), 0, pieces)
        self._batches = {kind: self._dealt(kind) for kind in set(self._kinds)}

    def run(self, wish_to_stop: Callable[[], bool]) -> Tensor | None:
        """The sampler's output on rank 0, None elsewhere and when stopped."""
        steps = self._steps(wish_to_stop)
        step = next(steps, None)
        self._expect(step)
        previous: Evaluation | None = None
        while step is not None:
            evaluation = step.evaluation
            # Asked for before the computing, so that the next step's messages come beside it.
            following = next(steps, None)
            self._expect(following)
            if following is not None and self._comes_beside(step, following):
                self._stage.post()
            if step.begins:
                self._context.begin_evaluation(self._job.noise.device)
            self._compute(step, previous)
            self._stage.post()
            if self._first is not None:
                self._first.post(evaluation, len(step.patches))
            if following is None or following.evaluation is not evaluation:
                self._settle()
                for batch in self._batches[self._kinds[evaluation.number]] if not evaluation.keeps else ():
                    self._keys.forget(batch.key)
                previous = evaluation
            step = following
        self._settle()
        if self._first is None or previous is None:
            return None
        for patch in range(len(self._patches.rows)):
            self._first.take(previous, patch)
        is_done = previous.number + 1 == len(self._program.calls)
        return self._first.result if is_done and self._context.rank == 0 else None

    def _comes_beside(self, step: _Step, following: _Step) -> bool:
        """Whether the next step's messages may come while this rank computes a step.

        A patch's sender needs what this stage made of it an evaluation ago: in that step, where there is one patch, or
        where it is a whole evaluation. A whole one's needs all of the one before, of which that step is the end. And
        not with NCCL: were two stages to wait for their devices at
        once, each with a receive posted whose sender is the other, neither would come to its send. Posted after the
        launch, a receive waits for steps before its own only, so some stage can always go on.
        """
        is_needed = step.evaluation.is_exact or following.evaluation.is_exact or len(self._patches.rows) == 1
        return self._job.noise.device.type == "cpu" and not is_needed

    def _settle(self) -> None:
        """An evaluation is over: what was sent in the one before has arrived, or none of this could have."""
        self._stage.settle()
        if self._sent is not None:
            self._sent.settle()

    def _steps(self, wish_to_stop: Callable[[], bool]) -> Iterator[_Step]:
        program, everything = self._program, tuple(range(len(self._patches.rows)))
        agreement = Agreement(wish_to_stop, self._context.world, lag=LAG)
        for number, call in enumerate(program.calls):
            following = self._next_of_kind(number)
            # What is agreed on now holds from the next evaluation on, so that nobody expects what nobody sends.
            goes_on = agreement.go_on()
            is_end = not goes_on or number + 1 == len(program.calls)
            evaluation = Evaluation(
                number=number,
                call=call,
                is_exact=self._is_exact(number),
                keeps=following is not None and not self._is_exact(following),
                is_end=is_end,
            )
            if self._first is not None:
                self._first.expect(evaluation)
            batches = self._batches[self._kinds[number]]
            if evaluation.is_exact:
                # Rows don't see each other, so one follows the other through the stages.
                whole = [(row, None) for batch in batches for row in batch.apart(self._model.family)]
                yield _Step(evaluation=evaluation, patches=everything, computed=whole, begins=True)
            for patch in everything if not evaluation.is_exact else ():
                computed = [(batch, patch) for batch in batches]
                yield _Step(evaluation=evaluation, patches=(patch,), computed=computed, begins=patch == 0)
            if is_end:
                break
        agreement.close()

    def _is_exact(self, number: int) -> bool:
        """The first evaluations, and those without one before that had the same conditionings."""
        is_early = not self._job.stale or number < self._job.warmup_steps
        return is_early or self._kinds[number] not in self._kinds[:number]

    def _next_of_kind(self, number: int) -> int | None:
        later = range(number + 1, len(self._kinds))
        return next((other for other in later if self._kinds[other] == self._kinds[number]), None)

    def _expect(self, step: _Step | None) -> None:
        for batch, patch in step.computed if step is not None else ():
            x = batch.call["x"]
            numel = self._engine.numel(batch.cut, patch, x.shape[0])
            if numel is not None:
                self._stage.expect(numel, x.dtype, x.device)

    def _compute(self, step: _Step, previous: Evaluation | None) -> None:
        if self._first is not None and previous is not None:
            for patch in step.patches:
                self._first.take(previous, patch)
        rows: dict[tuple[Kind, int], list[Tensor]] = {}
        for batch, part in step.computed:
            out = self._forward(step, batch, part)
            if out is not None:
                rows.setdefault(batch.key, []).append(out)
        outputs: list[Tensor] = []
        for batch in self._batches[self._kinds[step.evaluation.number]] if rows else ():
            outputs += torch.cat(rows[batch.key]).split([piece.stop - piece.start for piece in batch.pieces])
        if self._last is not None:
            for patch in step.patches:
                self._last.finish(step.evaluation, patch, outputs)

    def _forward(self, step: _Step, batch: _Batch, patch: int | None) -> Tensor | None:
        timestep = torch.full_like(batch.call["timestep"], step.evaluation.call.timestep)
        call = {**batch.call, **dict.fromkeys(batch.timesteps, timestep)}
        if self._first is not None:
            x = torch.cat([self._first.x[piece.start : piece.stop] for piece in batch.pieces])
            # What the model sees beside the latent comes after its channels.
            call["x"] = torch.cat([x, call["x"][:, x.shape[1] :]], 1)
        self._keys.begin(batch.key, keep=step.evaluation.keeps, first=batch.first, num_rows=batch.num_rows)
        self._engine.begin(step.evaluation, (batch.key, batch.first), batch.cut, patch)
        return self._stage.forward(lambda: self._model.family.run(self._model, call))

    def _dealt(self, kind: Kind) -> list[_Batch]:
        """What this rank's lane computes in an evaluation of the kind."""
        spec, num_rows = self._context.spec, self._job.noise.shape[0]
        pieces = deal([num_rows] * len(kind), cfg=spec.cfg, dp=spec.dp)[self._context.lane]
        together = self._model.family.batched([self._rows(kind, piece) for piece in pieces]) if pieces else None
        groups = [pieces] if together is not None else [[piece] for piece in pieces]
        return [self._batch(kind, number, group) for number, group in enumerate(groups)]

    def _batch(self, kind: Kind, number: int, pieces: list[Piece]) -> _Batch:
        """Raises InputError for conditionings that the model does not take or the axes cannot cut."""
        rows = [self._rows(kind, piece) for piece in pieces]
        call = self._model.family.batched(rows) or rows[0]
        self._model.family.check(self._model, call)
        cut = self._engine.cut(call, self._patches)
        known = self._call(kind[pieces[0].call])
        timesteps = [name for name, value in known.items() if value is known["timestep"]]
        whole = {"first": 0, "num_rows": call["x"].shape[0]}
        return _Batch(key=(kind, number), pieces=pieces, call=call, cut=cut, timesteps=timesteps, **whole)

    def _rows(self, kind: Kind, piece: Piece) -> Call:
        return self._model.family.of_rows(self._call(kind[piece.call]), piece.rows)

    def _call(self, cond: int) -> Call:
        """The call for a conditioning, but for what changes: its timestep is 0, its latent NaN.

        The latent is on the first stage only. What looked at it on another would show that, instead of a picture that
        is nearly right.
        """
        x = torch.full_like(self._job.noise, torch.nan)
        return calls_argument(x, 0.0, self._conds[cond], self._model)


def _whole_rows(job: SamplingJob, kind: Kind) -> list[Piece]:
    return [Piece(call=number, start=0, stop=job.noise.shape[0]) for number, _ in enumerate(kind)]
