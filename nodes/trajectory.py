"""Whether a sampling job can run on the workers as a whole, and everything it needs there.

To be used by a SAMPLER_SAMPLE wrapper, where the guider is prepared and nothing is sampled yet:

    reason = why_step_mode(guider, sampler, sigmas, noise, latent_image, denoise_mask, callback)
    if reason is None:
        job = plan(sampler, guider, sigmas, extra_args, noise, latent_image, denoise_mask)   # or NotAProgram

`job` has the fields of the `Sample` message. Previews come back as (step, total, denoised); ComfyUI's
callback is then callback(step, denoised, denoised, total): ComfyUI's own looks at the denoised latent only, and
the sampler's state stays on the workers. What the wrapper returns is the run's output.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_base
import comfy.samplers
import latent_preview
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_xdit_nodes.constant_call import constant_calls
from comfy_xdit_nodes.named import name_of
from comfy_xdit_nodes.put_back import as_it_was
from comfy_xdit_nodes.trace import NotAProgram, trace
from torch import Tensor

from comfy_xdit.trajectory import SamplerProgram

OURS = "comfy_xdit"
"""Wrappers registered under a key that starts so are this plugin's own, and are no hindrance."""

LOOP_OPTIONS = {
    "sampler_cfg_function": "a CFG function",
    "sampler_post_cfg_function": "a post-CFG function",
    "sampler_pre_cfg_function": "a pre-CFG function",
    "sampler_calc_cond_batch_function": "a function in place of ComfyUI's evaluation of conditioning",
    "model_function_wrapper": "a wrapper around the model function",
    "denoise_mask_function": "an inpaint mask that changes with the step",
    "context_handler": "context windows",
    "multigpu_clones": "ComfyUI's own multi-GPU",
}

LOOP_WRAPPERS = (
    WrappersMP.SAMPLER_SAMPLE,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)

COND_PARTS = {
    "area": "an area of the image",
    "mask": "a mask",
    "hooks": "hooks",
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "default": "default conditioning",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """A run, ready to travel. noises: by index, None for those that the program never reads.

    mask: with the latent's shape, 1 where it is made anew; None without inpainting.
    conds: the network's constant arguments for each of `program.conds`.
    """

    program: SamplerProgram
    noise: Tensor
    latent: Tensor
    mask: Tensor | None
    noises: list[Tensor | None]
    conds: list[dict[str, Any]]


def plan(
    sampler: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    noise: Tensor,
    latent_image: Tensor | None,
    denoise_mask: Tensor | None = None,
    constants: Callable[..., list[dict[str, Any]]] = constant_calls,
) -> SamplingJob:
    """The job of `sampler.sample` with these arguments; `guider` as in its `inner_sample`.

    Call it inside the pool's lease. constants: finds the network's constant arguments.
    Afterwards torch's random generators are where the host's own run would have left them.
    Raises NotAProgram when the run has to stay in the host's loop, or the host's interruption; all generators,
    the sampler's own too, and the sampler's state are then as they were.
    """
    latent = torch.zeros_like(noise) if latent_image is None else latent_image
    mask = None if denoise_mask is None else denoise_mask.to(noise).expand(noise.shape)
    with as_it_was(noise.device, sampler, *_own(guider)) as moved:
        program, drawn = trace(
            sampler,
            guider,
            sigmas,
            extra_args=extra_args,
            noise=noise,
            latent=latent,
            mask=mask,
            drawing=moved.meet,
        )
        reason = next(_ranges(guider.conds, [call.sigma for call in program.calls]), None)
        if reason is not None:
            raise NotAProgram(reason)
        conds = constants(guider, program, noise, extra_args.get("model_options", {}))
    return SamplingJob(program=program, noise=noise, latent=latent, mask=mask, noises=drawn, conds=conds)


def _own(guider: Any) -> list[Any]:
    """What a guider may remember from step to step, beside the model and its conditioning."""
    given = ("model_patcher", "model_options", "inner_model", "conds", "original_conds", "loaded_models")
    return [value for name, value in vars(guider).items() if name not in given]


def why_step_mode(
    guider: Any,
    sampler: Any,
    sigmas: Tensor,
    noise: Tensor,
    latent_image: Tensor | None,
    denoise_mask: Tensor | None,
    callback: Callable[..., None] | None = None,
) -> str | None:
    """One sentence on what keeps this job in ComfyUI's own loop; None when nothing is known that does.

    guider: as inside its `inner_sample`. What only shows in the sampler's arithmetic is for `trace` to find.
    """
    if not _only_shows(callback):
        return (
            f"{name_of(callback)} is called after every step with the sampler's own latent, which it may look at or "
            "change"
        )
    return next(_hindrances(guider, sampler, sigmas, noise, denoise_mask), None)


def _only_shows(callback: Callable[..., None] | None) -> bool:
    """Whether it is ComfyUI's own, which shows the denoised latent. Told by where its code looks up names: a
    wrapper may bear the name of what it wraps.
    """
    if callback is not None and getattr(callback, "__globals__", None) is vars(comfy.samplers):
        # Between the sampler and the callback, where a latent holds several: it takes them apart.
        callback = inspect.getclosurevars(callback).nonlocals.get("packed_callback", callback)
    return callback is None or getattr(callback, "__globals__", None) is vars(latent_preview)


def _hindrances(guider: Any, sampler: Any, sigmas: Tensor, noise: Tensor, denoise_mask: Tensor | None) -> Iterator[str]:
    if len(sigmas) < 2:
        yield "there is no step to run"
    options = guider.model_options
    for name, title in LOOP_OPTIONS.items():
        if options.get(name):
            yield f"the model has {title} ({_first(options[name])}), which runs between the steps"
    yield from _wrapped(guider, options)
    yield from _conditioning(guider.conds)
    yield from _ranges(guider.conds, [float(sigma) for sigma in sigmas if sigma > 0])
    base, model = comfy.model_base.BaseModel, guider.inner_model
    if type(model)._apply_model is not base._apply_model or type(model).apply_model is not base.apply_model:
        yield f"{type(model).__name__} prepares each step in its own way"
    if denoise_mask is not None:
        if type(model).process_timestep is not base.process_timestep:
            yield f"{type(model).__name__} turns an inpaint mask into timesteps"
        if type(sampler).sample is not comfy.samplers.KSAMPLER.sample:
            yield f"the sampler {type(sampler).__name__} treats inpaint masks in its own way"


def _wrapped(guider: Any, options: dict[str, Any]) -> Iterator[str]:
    inside = options.get("transformer_options", {})
    for kind in LOOP_WRAPPERS:
        for key, functions in inside.get("wrappers", {}).get(kind, {}).items():
            if functions and not str(key).startswith(OURS):
                yield f"a {kind} wrapper ({_first(functions)}) runs between the steps"
    patcher = guider.model_patcher
    callbacks = list(inside.get("callbacks", {}).get(CallbacksMP.ON_PREPARE_STATE, {}).items())
    callbacks += list(getattr(patcher, "callbacks", {}).get(CallbacksMP.ON_PREPARE_STATE, {}).items())
    for key, functions in callbacks:
        if functions and not str(key).startswith(OURS):
            yield f"a callback ({_first(functions)}) runs before every step"


def _conditioning(conds: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for name, entries in conds.items():
        if len(entries) != 1:
            yield f"the {name} conditioning has {len(entries)} parts, to be weighed in every step"
        for entry in entries:
            for part, title in COND_PARTS.items():
                if entry.get(part) is not None:
                    yield f"the {name} conditioning has {title}"


def _ranges(conds: dict[str, list[dict[str, Any]]], sigmas: list[float]) -> Iterator[str]:
    """Conditioning that is on in some steps only. Ranges are sigmas, counted down, as the host keeps them."""
    for name, entries in conds.items():
        for entry in entries:
            start, end = entry.get("timestep_start"), entry.get("timestep_end")
            if any((start is not None and s > start) or (end is not None and s < end) for s in sigmas):
                yield f"the {name} conditioning is on in a part of the steps only"


def _first(value: Any) -> str:
    """The name of a function; of several, the first one's."""
    return name_of(value[0] if isinstance(value, (list, tuple)) else value)
