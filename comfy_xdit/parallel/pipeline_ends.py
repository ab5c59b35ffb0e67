"""A latent's patches between the two ends of a pipeline: the first stage computes them, the last makes their
part of the sampler's step and sends them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.trajectory import Replay, SamplerCall, SamplerProgram

from .context import ParallelContext
from .denoise import deal, share
from .job import SamplingJob
from .latent_tokens import Grid
from .links import Inbox, Outbox, Shelf
from .model import Model, loop_dtype
from .patch_rows import cut_rows, pixel_rows

Post = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One call of the sampler's program. is_exact: the whole sequence goes through the stages at once.

    keeps: another of its kind will need keys and values. is_end: none follows, for it is the last or the job stops.
    """

    number: int
    call: SamplerCall
    is_exact: bool
    keeps: bool
    is_end: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPatches:
    """How a job's latent is cut, alike in all of its frames. rows: of tokens; pixels: of the latent."""

    grid: Grid
    rows: list[range]
    pixels: list[slice]

    @classmethod
    def of(cls, job: SamplingJob, grid: Grid, context: ParallelContext) -> LatentPatches:
        """Raises InputError when the latent cannot be cut for the axes of `context`."""
        height = job.noise.shape[-2]
        rows = cut_rows(
            grid,
            num_patches=job.num_patches,
            num_stages=context.axis("pipe").degree,
            num_shards=context.axis("sequence").degree,
        )
        return cls(grid=grid, rows=rows, pixels=[pixel_rows(grid, part, height) for part in rows])

    def cut(self, x: Tensor, patch: int) -> Tensor:
        """The patch's part of something of the latent's height."""
        return x[..., self.pixels[patch], :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """What the last stage sends back for each patch of an evaluation.

    Previews and the result are for the host, so they go to rank 0 only; x, the model's next input, goes to
    every first stage. All in the loop's dtype but x, which is rounded first: half the bytes.
    """

    program: SamplerProgram
    x_dtype: torch.dtype
    loop_dtype: torch.dtype
    to_host: bool

    @classmethod
    def of(cls, model: Model, job: SamplingJob, context: ParallelContext) -> Replies:
        return cls(
            program=job.program,
            x_dtype=model.compute_dtype,
            loop_dtype=loop_dtype(model),
            to_host=context.axis("pipe").ranks[0] == 0,
        )

    def to(self, evaluation: Evaluation) -> list[str]:
        """In order: "preview" for each that is due, then "x", or "result" after the last call."""
        previews = ["preview" for preview in self.program.previews if preview.after == evaluation.number]
        found = previews if self.to_host else []
        if not evaluation.is_end:
            return [*found, "x"]
        is_done = evaluation.number + 1 == len(self.program.calls)
        return [*found, "result"] if is_done and self.to_host else found

    def dtype(self, what: str) -> torch.dtype:
        return self.x_dtype if what == "x" else self.loop_dtype


class FirstStage:
    """The latent as the model is given it, patch by patch as new. x: [batch, channels, …, height, width].

    On rank 0 also the end of the job: previews are posted when all their patches are there, and `result`.
    """

    def __init__(
        self, job: SamplingJob, patches: LatentPatches, replies: Replies, link: Inbox | Shelf, post: Post
    ) -> None:
        self._patches, self._replies, self._link, self._post = patches, replies, link, post
        whole = Replay(
            job.program,
            noise=job.noise,
            latent=job.latent,
            noises=job.noises,
            mask=job.mask,
            dtype=replies.loop_dtype,
        )
        # A copy: patches will be written into it, and it may be the job's own noise.
        self.x = whole.model_input(0).to(replies.x_dtype, copy=True)
        self.result = torch.empty_like(job.noise, dtype=replies.loop_dtype)
        self._previews: list[list[Tensor]] = []

    def expect(self, evaluation: Evaluation) -> None:
        """The evaluation begins: this is what the last stage will make of its patches."""
        for patch, _ in enumerate(self._patches.rows):
            for what in self._replies.to(evaluation):
                shape = self._patches.cut(self.x, patch).shape
                self._link.expect(shape, self._replies.dtype(what), self.x.device)

    def post(self, evaluation: Evaluation, num_patches: int) -> None:
        """So many more patches are launched here: what becomes of them may come while others compute."""
        self._link.post(num_patches * len(self._replies.to(evaluation)))

    def take(self, evaluation: Evaluation, patch: int) -> None:
        """Wait for what the last stage made of a patch. Patch after patch, before its next evaluation."""
        shown = []
        for what in self._replies.to(evaluation):
            came = self._link.take()
            if what == "preview":
                shown.append(came)
            else:
                self._patches.cut(self.x if what == "x" else self.result, patch).copy_(came)
        self._previews.append(shown)
        if len(self._previews) == len(self._patches.rows):
            due = [preview for preview in self._replies.program.previews if preview.after == evaluation.number]
            # No parts at all where they go to another rank.
            for preview, parts in zip(due, zip(*self._previews, strict=True), strict=False):
                self._post({"step": preview.step, "total": preview.total, "denoised": torch.cat(parts, -2)})
            self._previews = []


class LastStage:
    """The sampler's state of each patch. Every lane has that of all rows, as lanes share their outputs."""

    def __init__(
        self,
        job: SamplingJob,
        patches: LatentPatches,
        replies: Replies,
        link: Outbox | Shelf,
        context: ParallelContext,
        num_channels: int,
    ) -> None:
        """num_channels: of the model's output."""
        self._job, self._patches, self._replies, self._link = job, patches, replies, link
        self._context, self._num_channels = context, num_channels
        self._replays = [self._replay(patch) for patch, _ in enumerate(patches.rows)]

    def finish(self, evaluation: Evaluation, patch: int, outputs: Sequence[Tensor]) -> None:
        """Make the sampler's step on a patch and send what is due.

        outputs: the model's, for each piece that this lane was dealt, of the latent's whole size.
        Collective over the lanes.
        """
        call, replay = evaluation.call, self._replays[patch]
        x = replay.model_input(evaluation.number)
        spec = self._context.spec
        lanes = deal([x.shape[0]] * len(call.conds), cfg=spec.cfg, dp=spec.dp)
        parts = [self._patches.cut(output, patch) for output in outputs]
        shapes = [(x.shape[0], self._num_channels, *x.shape[2:])] * len(call.conds)
        whole = share(shapes, lanes, parts, x.new_empty(0, dtype=self._replies.x_dtype), self._context)
        replay.answer(evaluation.number, whole)
        shown = iter(replay.previews(evaluation.number))
        for what in self._replies.to(evaluation):
            if what == "preview":
                made = next(shown).denoised
            else:
                made = replay.model_input(evaluation.number + 1) if what == "x" else replay.output()
            self._link.send(made.to(self._replies.dtype(what)))

    def _replay(self, patch: int) -> Replay:
        job, cut = self._job, self._patches.cut

        def noise(index: int) -> Tensor:
            whole = job.noises[index]
            assert whole is not None, f"noise {index} did not come with the job"
            return cut(whole, patch)

        return Replay(
            job.program,
            noise=cut(job.noise, patch),
            latent=cut(job.latent, patch),
            noises=noise,
            mask=cut(job.mask, patch) if job.mask is not None else None,
            dtype=self._replies.loop_dtype,
        )
