"""The whole sampling loop on the workers: the host's program is replayed, the model evaluated in parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from comfy_xdit.trajectory import Replay, SamplerCall, SamplerProgram

from .agreement import Agreement
from .attention import SequenceAttention
from .checks import check_program, check_replay
from .context import ParallelContext
from .cut import cut
from .denoise import check_calls, evaluate
from .distri import DistriKeys
from .job import SamplingJob
from .model import Call, Model, calls_argument, loop_dtype
from .patch_engine import has_patches
from .pipefusion import pipefusion

Post = Callable[[dict[str, Any]], None]


def sample(
    model: Model,
    job: SamplingJob,
    conds: list[Call],
    context: ParallelContext,
    *,
    post: Post,
    wish_to_stop: Callable[[], bool],
) -> tuple[Tensor | None, dict[str, Any]]:
    """What the host's sampler would return, on rank 0 (None elsewhere, and when stopped), and a report.

    job: with its tensors on the model's device; conds: its conditioning with held values in place.
    post: takes each progress entry {"step", "total", "denoised"}; called on rank 0.
    wish_to_stop: asked before each evaluation; one rank's yes stops all.
    Every rank replays the sampler on the whole latent, which costs next to nothing; only the model's
    evaluations are shared out; on a pipe axis see `pipefusion`, or, where the latent can't be cut, `drained`: exact.
    Collective over all ranks. Raises InputError alike on every rank.
    """
    program: SamplerProgram = job.program
    check_program(job, conds)
    calls = [calls_argument(job.noise, 0.0, cond, model) for cond in conds]
    check_calls(model, calls, context)
    check_replay(job, loop_dtype(model))
    if context.spec.pipe > 1 and has_patches(model, calls):
        return pipefusion(model, job, conds, context, post=post, wish_to_stop=wish_to_stop)
    replay = Replay(
        program,
        noise=job.noise,
        latent=job.latent,
        noises=job.noises,
        mask=job.mask,
        dtype=loop_dtype(model),
    )
    keys = DistriKeys(
        context.axis("distri"),
        [tuple(call.conds) for call in program.calls],
        warmup_steps=job.warmup_steps,
        stale=job.stale,
    )
    agreement = Agreement(wish_to_stop, context.world)
    stopped = False
    with keys, cut(model.module, model.family.plan, context, SequenceAttention(context, keys)):
        for number, call in enumerate(program.calls):
            stopped = not agreement.go_on()
            if stopped:
                break
            keys.begin(number)
            context.begin_evaluation(job.noise.device)
            x = replay.model_input(number)
            outputs = _outputs(model, call, x, conds, context)
            replay.answer(number, outputs)
            for preview in replay.previews(number):
                if context.rank == 0:
                    post({"step": preview.step, "total": preview.total, "denoised": preview.denoised})
    report = {**context.report(), "buffer_bytes": keys.most_bytes_held}
    return (None if stopped or context.rank != 0 else replay.output()), report


def _outputs(model: Model, call: SamplerCall, x: Tensor, conds: list[Call], context: ParallelContext) -> list[Tensor]:
    """The model's output for each of the call's conditionings, on every rank, in the loop's dtype."""
    calls = [calls_argument(x, call.timestep, conds[index], model) for index in call.conds]
    together = model.family.batched(calls)
    if together is None:
        outputs = evaluate(model, calls, context)
    else:
        outputs = list(evaluate(model, [together], context)[0].chunk(len(calls)))
    return [output.to(loop_dtype(model)) for output in outputs]
