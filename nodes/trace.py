"""The host's own sampler, run once and recorded: what comes out is a program, and the noise that it drew.

The sampler gets traced tensors with the run's real noise in them, draws its noise as ever, and its model
answers at once, with numbers that only serve to check the record. Whatever a program can't hold ends in
`NotAProgram`; the run is then ComfyUI's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_management import throw_exception_if_processing_interrupted as poll
from comfy.patcher_extension import WrappersMP
from comfy_xdit_nodes.noise_sources import Tap
from torch import Tensor

from comfy_xdit.quoted import quoted
from comfy_xdit.sampler_recorder import NotAProgram, SamplerRecorder, Traced
from comfy_xdit.trajectory import Replay, SamplerProgram

__all__ = ["NotAProgram", "trace"]


def trace(
    sampler: Any,
    guider: Any,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any],
    noise: Tensor,
    latent: Tensor,
    mask: Tensor | None = None,
    drawing: Callable[[torch.Generator], None] = lambda generator: None,
) -> tuple[SamplerProgram, list[Tensor | None]]:
    """The program of `sampler.sample` as the host is about to call it, and its noises by index.

    guider: as inside its `inner_sample` (with `inner_model` and `conds`). extra_args: with "model_options"
    and "seed". noise, latent: [batch, channels, …]; mask: with their shape, 1 where the latent is made anew.
    A noise that the program never reads is None. drawing: called with each generator before it is drawn from.
    Leaves the random generators where the host's own run would; the model is not evaluated.
    Raises NotAProgram, with the reason, when the run has to stay in the host's loop; the host's interruption.
    """
    try:
        with torch.no_grad():
            return _Run(guider, noise, drawing).record(sampler, sigmas, extra_args, noise, latent, mask)
    except (NotAProgram, InterruptProcessingException):
        raise
    except Exception as error:
        # A sampler of any author, given tensors it never saw: whatever it raises, step mode takes it.
        raise NotAProgram(f"the sampler fails in a trace: {type(error).__name__}: {quoted(error)}") from error


class _Model:
    """The host's model for samplers that read its settings; calling it would leave the trace."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name in ("apply_model", "_apply_model", "diffusion_model"):
            raise NotAProgram(f"the sampler or guider uses the model's {name} itself")
        return getattr(self._model, name)


class _Run:
    """A run of the host's sampler, recorded, with a model that costs nothing."""

    def __init__(self, guider: Any, noise: Tensor, drawing: Callable[[torch.Generator], None]) -> None:
        self._drawing = drawing
        self._guider = copy.copy(guider)
        self._guider.inner_model = _Model(guider.inner_model)
        self._recorder = SamplerRecorder(noise)
        self._conds: list[str] = []
        self._drawn: list[Tensor] = []
        self._shown: list[Tensor] = []

    def record(
        self,
        sampler: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        noise: Tensor,
        latent: Tensor,
        mask: Tensor | None,
    ) -> tuple[SamplerProgram, list[Tensor | None]]:
        tap = Tap(noise.shape, self._noise, self._drawing)
        sampler = copy.copy(sampler)
        options = getattr(sampler, "extra_options", {})
        if callable(options.get("noise_sampler")):
            sampler.extra_options = options | {"noise_sampler": tap.noise_sampler(options["noise_sampler"])}
        model_options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
        wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        wrappers[WrappersMP.CALC_COND_BATCH] = {"comfy-xdit.trace": [self._evaluate]}
        # Copies: samplers write into their arguments (uni_pc into sigmas, CFG++ into the options).
        args = extra_args | {"model_options": model_options}
        given = {"noise": noise, "latent": latent, "mask": mask}
        traced = [None if numbers is None else self._recorder.value(name, numbers) for name, numbers in given.items()]
        with tap.open():
            output = sampler.sample(self._guider, sigmas.clone(), args, self._show, *traced, True)
        program = self._recorder.program(self._conds, output)
        self._check(program, given, output)
        used = set(program.noises())
        return program, [drawn if j in used else None for j, drawn in enumerate(self._drawn)]

    def _noise(self, drawn: Tensor) -> Tensor:
        poll()
        self._drawn.append(drawn)
        return self._recorder.value(f"n{len(self._drawn) - 1}", drawn)

    def _show(self, step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        self._recorder.preview(step, total, denoised)
        assert isinstance(denoised, Traced)
        self._shown.append(denoised.cell.numbers)

    def _evaluate(
        self, _: Any, model: Any, conds: list[Any], x: Tensor, sigma: Tensor, *rest: Any
    ) -> list[Tensor]:
        """The host's calc_cond_batch: one denoised latent for each conditioning, zeros for None."""
        poll()
        if model is not self._guider.inner_model:
            raise NotAProgram("the guider evaluates more than one model")
        sampling = model.model_sampling
        level, timestep = _one(sigma), _one(sampling.timestep(sigma).float())
        asked = [self._number_of(cond) for cond in conds if cond is not None]
        outputs = iter(
            self._recorder.call(
                sampling.calculate_input(sigma, x), sigma=level, timestep=timestep, conds=asked, network=_network
            )
        )
        answers = []
        for cond in conds:
            if cond is None:
                answers.append(x.new_zeros((1,) * x.dim()).expand(x.shape))
                continue
            denoised = sampling.calculate_denoised(sigma, next(outputs), x)
            answers.append(_weighed(denoised, float(cond[0].get("strength", 1.0))))
        return answers

    def _number_of(self, cond: Any) -> int:
        name = next((name for name, own in self._guider.conds.items() if own is cond), None)
        if name is None:
            raise NotAProgram("the guider makes up conditioning of its own")
        if name not in self._conds:
            self._conds.append(name)
        return self._conds.index(name)

    def _check(self, program: SamplerProgram, given: dict[str, Tensor | None], output: Tensor) -> None:
        """Raises NotAProgram when a replay comes to something else than the host's sampler came to."""
        sample = self._recorder.sample
        begin = {name: whole if whole is None else sample(whole) for name, whole in given.items()}
        noises = [sample(drawn) for drawn in self._drawn]
        replay, shown = Replay(program, **begin, noises=noises, dtype=self._recorder.like.dtype), []
        for number, call in enumerate(program.calls):
            poll()
            x = replay.model_input(number)
            replay.answer(number, [_network(x, k) for k, _ in enumerate(call.conds)])
            shown += [progress.denoised for progress in replay.previews(number)]
        assert isinstance(output, Traced)
        pairs = zip([*shown, replay.output()], [*self._shown, output.cell.numbers], strict=True)
        if not all(torch.equal(ours, host) for ours, host in pairs):
            raise NotAProgram("the sampler's result is not what its recorded operations give")


def _network(x: Tensor, k: int) -> Tensor:
    """Something of x that no sampler could foresee, so that the record shows its mistakes."""
    return torch.tanh(x) / (1 + k)


def _one(numbers: Tensor) -> float:
    """The number of a batch whose images all have the same."""
    found = set(numbers.reshape(-1).tolist())
    if len(found) != 1:
        raise NotAProgram("the sampler gives the images of a batch different sigmas")
    return float(found.pop())


def _weighed(denoised: Tensor, strength: float) -> Tensor:
    """As the host adds up conditioning, even where there is one part: its weight cancels, but for rounding."""
    if strength == 1.0:
        return denoised
    weight = denoised.new_ones((1,) * denoised.dim()) * strength
    return denoised * weight / (weight + 1e-37)
