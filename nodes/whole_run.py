"""A sampling run on the workers as a whole: ComfyUI's own loop rests, its callback is called as ever.

Where a run can't leave ComfyUI's loop, the loop runs and each of its evaluations goes to the workers.
The log says which it is, and why.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy_xdit_nodes.remote import poll
from comfy_xdit_nodes.run import count_chunks
from comfy_xdit_nodes.trace import NotAProgram
from comfy_xdit_nodes.trajectory import SamplingJob, plan, why_step_mode
from torch import Tensor
from tqdm.auto import tqdm

from comfy_xdit import messages as m

if TYPE_CHECKING:
    from comfy_xdit.parallel.spec import ParallelSpec
    from comfy_xdit.pool.client import Pool

log = logging.getLogger("comfy_xdit")

MAX_STEPS = 1000
"""A step takes a millisecond to record, and its record a few kilobytes of the message."""

PEEK_EVERY_S = 0.1

PEEK_TIMEOUT_S = 15.0
"""Longer than a stopped worker lives: a report is asked for once, and an answer that nobody waits for is lost."""


def sample_whole(
    executor: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[..., None] | None,
    noise: Tensor,
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    disable_pbar: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """ComfyUI's SAMPLER_SAMPLE wrapper: the whole loop on the workers if it can be, else ComfyUI's."""
    sampler, given = executor.class_obj, (noise, latent_image, denoise_mask)
    reason = _why_not(guider, sampler, sigmas, *given, callback)
    if reason is None:
        try:
            job = plan(sampler, guider, sigmas, extra_args, *given)
        except NotAProgram as found:
            reason = str(found)
        else:
            how = f"as a whole on the workers, {len(job.program.calls)} evaluations"
            _say(guider, sampler, _num_chunks(job), how + _price_of_whole(guider, job))
            return _run(guider, job, callback, disable_pbar).to(noise.device)
    num_chunks = count_chunks(guider)
    price = _price(_spec(guider, num_chunks), num_chunks * noise.shape[0])
    _say(guider, sampler, num_chunks, f"step by step in ComfyUI, since {reason}{price}")
    return executor(guider, sigmas, extra_args, callback, *given, disable_pbar, *args, **kwargs)


def _why_not(guider: Any, sampler: Any, sigmas: Tensor, *given: Any) -> str | None:
    if guider.model_patcher.setting.sampling == "step":
        return "the pool's `sampling` is set to 'step'"
    if len(sigmas) - 1 > MAX_STEPS:
        return f"it has {len(sigmas) - 1} steps, more than the {MAX_STEPS} whose record is worth sending"
    return why_step_mode(guider, sampler, sigmas, *given)


def _say(guider: Any, sampler: Any, num_chunks: int, how: str) -> None:
    """The one line about a run."""
    run, checkpoint = guider.inner_model.remote.run, guider.model_patcher.model.checkpoint
    title = f"{checkpoint.shape.title}{checkpoint.whose}"
    spec = _spec(guider, num_chunks)
    ranks = f"{spec.num_ranks} ranks, " if spec.num_ranks > 1 else ""
    log.info("%s on pool %s (%s%s): %s runs %s", title, run.pool.name, ranks, spec, _name(sampler), how)


def _spec(guider: Any, num_chunks: int) -> ParallelSpec:
    """The degrees of this run."""
    return guider.inner_model.remote.run.spec(num_chunks)


def _price(spec: ParallelSpec, num_rows: int) -> str:
    """What becomes of the approximate methods when a step comes by itself; num_rows: it evaluates so many."""
    if spec.distri > 1:
        return "; distri waits for fresh keys there, so it is exact"
    return _price_of_stages(spec, num_rows)


def _price_of_whole(guider: Any, job: SamplingJob) -> str:
    """The same of a whole run: only where PipeFusion can't cut the latent do the stages run empty."""
    model, num_chunks = guider.inner_model, _num_chunks(job)
    if model.remote.has_patches(model.diffusion_model, job.noise, job.conds):
        return ""
    return _price_of_stages(_spec(guider, num_chunks), num_chunks * job.noise.shape[0])


def _price_of_stages(spec: ParallelSpec, num_rows: int) -> str:
    if spec.pipe == 1:
        return ""
    # Here: it brings the engine, which ComfyUI's start need not wait for.
    from comfy_xdit.parallel.drained import share_of_time

    share = share_of_time(math.ceil(num_rows / (spec.cfg * spec.dp)), spec.pipe)
    return (
        f"; the pipeline of {spec.pipe} stages runs empty after every evaluation there, so it is exact, "
        f"and each rank works {share:.0%} of the time"
    )


def _name(sampler: Any) -> str:
    """What ComfyUI's menus call a sampler, as far as it knows."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return name.removeprefix("sample_").removesuffix("_function")


def _num_chunks(job: SamplingJob) -> int:
    """How many conditionings can be evaluated side by side."""
    return max(len(call.conds) for call in job.program.calls)


def _run(guider: Any, job: SamplingJob, callback: Callable[..., None] | None, disable_pbar: bool) -> Tensor:
    run = guider.inner_model.remote.run
    key = uuid.uuid4().hex
    with tqdm(total=max((p.total for p in job.program.previews), default=0), disable=disable_pbar) as bar:

        def show(step: int, total: int, denoised: Tensor) -> None:
            bar.update(step + 1 - bar.n)
            if callback is not None:
                denoised = denoised.to(job.noise.device)
                # The sampler's state stays on the workers; ComfyUI's own callback does not look at it.
                callback(step, denoised, denoised, total)

        follower = Follower(run.pool, key, show)
        samples = run.sample(
            job,
            key=key,
            num_chunks=_num_chunks(job),
            reuse=guider.model_patcher.setting.reuse,
            poll=follower.poll,
        )
        follower.finish(len(job.program.previews))
    return samples


class Follower:
    """While a job runs: brings its progress to `show`, in order, and the user's interruption to the workers."""

    def __init__(self, pool: Pool, job: str, show: Callable[..., None]) -> None:
        self._pool = pool
        self._job = job
        self._show = show
        self._num_shown = 0
        self._next = 0.0

    def poll(self) -> bool:
        """To be called often; whether there was news. Raises ComfyUI's interruption, or what `show` raised; the job
        then ends early.
        """
        num_shown = self._num_shown
        try:
            poll()
            if time.monotonic() >= self._next:
                self._peek()
                self._next = time.monotonic() + PEEK_EVERY_S
        except BaseException:
            # Not waited for: rank 0 may stand still, and the user waits.
            self._pool.aside(m.Cancel(job=self._job), timeout_s=0)
            raise
        return self._num_shown > num_shown

    def finish(self, num_reports: int) -> None:
        """Show the rest, once the job is done. Raises RuntimeError when reports were lost on the way."""
        self._peek()
        if self._num_shown != num_reports:
            raise RuntimeError(
                f"{num_reports - self._num_shown} of {num_reports} progress reports did not come from the workers "
                f"within {PEEK_TIMEOUT_S:g} s, and the denoised latent with them; queue the workflow again"
            )

    def _peek(self) -> None:
        answer = self._pool.aside(m.Peek(job=self._job), poll=poll, timeout_s=PEEK_TIMEOUT_S)
        for entry in [] if answer is None else answer.value:
            self._show(entry["step"], entry["total"], entry["denoised"])
            self._num_shown += 1
