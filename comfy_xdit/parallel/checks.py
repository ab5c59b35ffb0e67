"""What a whole run must be, looked at before any rank computes or sends: then a mistake costs no worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comfy_xdit.errors import InputError
from comfy_xdit.quoted import quoted
from comfy_xdit.trajectory import Replay, SamplerProgram

from .job import SamplingJob
from .model import Call


def check_program(job: SamplingJob, conds: Sequence[Call]) -> None:
    """Raises InputError for conditionings that are not those of the program, and for noise that is no latent."""
    program = job.program
    if not isinstance(program, SamplerProgram):
        raise InputError(f"a run came with a {type(program).__name__} in place of a sampler's program")
    if len(conds) != len(program.conds):
        raise InputError(f"{len(conds)} conditionings came with a program for {len(program.conds)}; send one for each")
    if not program.calls:
        raise InputError("the sampler's program never calls the model; use at least one step")
    for call in program.calls:
        if not call.conds or not all(0 <= index < len(conds) for index in call.conds):
            raise InputError(f"the sampler's program calls the model with the conditionings {call.conds}")
    if job.num_patches < 0 or job.warmup_steps < 0:
        raise InputError(
            f"num_patches={job.num_patches} and warmup_steps={job.warmup_steps} count something; use 0 or more"
        )
    if job.noise.dim() < 3 or not job.noise.is_floating_point():
        raise InputError(f"noise of {list(job.noise.shape)} is no latent; give floats, [batch, channels, …]")


def check_replay(job: SamplingJob, dtype: torch.dtype) -> None:
    """Raises InputError where a latent has another shape than the noise, or the program cannot be run on them.

    dtype: of the sampler's state. The program is run on tensors without numbers, to which each operation must fit.
    """
    shape = job.noise.shape
    drawn = {f"noise {number}": noise for number, noise in enumerate(job.noises)}
    for name, value in {"latent": job.latent, "mask": job.mask, **drawn}.items():
        if value is not None and (value.shape != shape or not value.is_floating_point()):
            raise InputError(
                f"the {name} of a run has the shape {list(value.shape)} and {value.dtype}; give it the noise's "
                f"{list(shape)}, in floating-point numbers"
            )
    program: SamplerProgram = job.program
    for index in program.noises():
        if index >= len(job.noises) or job.noises[index] is None:
            raise InputError(f"the sampler's program reads noise {index}, which did not come with the run")
    _run_through(job, dtype)


def _run_through(job: SamplingJob, dtype: torch.dtype) -> None:
    program: SamplerProgram = job.program

    def empty(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else torch.empty_like(value, device="meta")

    given = {name: empty(getattr(job, name)) for name in ("noise", "latent", "mask")}
    try:
        replay = Replay(program, **given, noises=[empty(noise) for noise in job.noises], dtype=dtype)  # type: ignore[arg-type]
        for number, call in enumerate(program.calls):
            x = replay.model_input(number)
            _same_shape(x, job.noise)
            replay.answer(number, [torch.empty_like(x, dtype=dtype) for _ in call.conds])
        _same_shape(replay.output(), job.noise)
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        # Nothing else can be the cause: no memory is asked for, and no device.
        raise InputError(f"the sampler's program cannot be run: {quoted(error)}") from None


def _same_shape(made: torch.Tensor, wanted: torch.Tensor) -> None:
    if not isinstance(made, torch.Tensor) or made.shape != wanted.shape:
        raise TypeError(f"it makes {list(getattr(made, 'shape', []))} of latents of {list(wanted.shape)}")
