"""The host's own sampler, run on coordinates: what comes out are its coefficients.

The sampler gets a tensor whose last dim is a basis; each answer of the model and each noise is a
basis vector of its own. The tensors it makes of them are then rows of coefficients. A run on numbers
shows beforehand how many there are, and afterwards whether the rows tell the truth: they don't when
a sampler looks at values (adaptive steps, clamping), and then `NotLinear` says so.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Protocol

import comfy.model_patcher
import numpy as np
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP
from comfy_xdit_nodes.model_terms import model_terms
from comfy_xdit_nodes.noise_sources import Tap
from torch import Tensor

from comfy_xdit.history import Column, History
from comfy_xdit.trajectory import Replay, SamplerCall, SamplerPreview, SamplerProgram

AGREEMENT = 1e-7
"""Of the largest value: a run on numbers and the replay of its program differ by less, in float64."""


class NotLinear(Exception):
    """This run can't be a linear program; the text says why, to end up in the log."""


class Answers(Protocol):
    """What the model and the noise sources say during a run."""

    real: bool

    def noise(self, j: int, drawn: Tensor | None) -> Tensor: ...
    def output(self, i: int, k: int, x: Tensor) -> Tensor: ...
    def guided(self, i: int, made: Tensor) -> Tensor: ...


@dataclasses.dataclass(kw_only=True)
class Call:
    """One call of the guider: its input, the conditionings it asked for, their answers, and what it made."""

    sigma: float
    x: Tensor
    conds: list[str]
    outputs: list[Tensor]
    guided: Tensor


@dataclasses.dataclass(kw_only=True)
class Recording:
    """A run. noise_born: for each noise, how many calls were answered when it was drawn."""

    calls: list[Call] = dataclasses.field(default_factory=list)
    noises: list[Tensor] = dataclasses.field(default_factory=list)
    noise_born: list[int] = dataclasses.field(default_factory=list)
    previews: list[tuple[int, int, int, Tensor]] = dataclasses.field(default_factory=list)
    output: Tensor | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two runs of a linear sampler have in common."""
        calls = [(call.sigma, tuple(call.conds)) for call in self.calls]
        return calls, self.noise_born, [preview[:3] for preview in self.previews]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The tensors that a sampler is given; mask None where everything is made anew."""

    noise: Tensor
    latent: Tensor
    mask: Tensor | None


class _Model:
    """The host's model for samplers that read its settings; calling it would leave the trace."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name in ("apply_model", "_apply_model", "diffusion_model"):
            raise NotLinear(f"the sampler or guider uses the model's {name} itself")
        return getattr(self._model, name)


class _Guider:
    """The host's guider with our answers in place of the model's; records each call."""

    def __init__(self, guider: Any, answers: Answers, recording: Recording) -> None:
        self._guider = copy.copy(guider)
        self._guider.inner_model = _Model(guider.inner_model)
        self._answers = answers
        self._recording = recording
        self._call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        sigmas = set(sigma.reshape(-1).tolist())
        if len(sigmas) != 1:
            raise NotLinear("the sampler gives the images of a batch different sigmas")
        self._call = Call(sigma=sigmas.pop(), x=x.clone(), conds=[], outputs=[], guided=x)
        # A sampler's sigma is float32, whatever it was multiplied with on its way here.
        made = self._guider(x, sigma.to(torch.float32), **kwargs)
        call, self._call = self._call, None
        if not call.conds:
            raise NotLinear("the guider does not evaluate the model in every step")
        call.guided = made.clone()
        self._recording.calls.append(call)
        return self._answers.guided(len(self._recording.calls) - 1, made)

    def evaluate(self, _: Any, model: Any, conds: list[Any], x: Tensor, *rest: Any) -> list[Tensor]:
        """The host's calc_cond_batch: one denoised latent for each conditioning, zeros for None."""
        call = self._call
        if call is None or call.conds or model is not self._guider.inner_model:
            raise NotLinear("the guider evaluates more than one model, or one model more than once in a step")
        if x.shape != call.x.shape or not torch.equal(x, call.x):
            raise NotLinear("the guider changes the latent before it evaluates the model")
        names = {id(cond): name for name, cond in self._guider.conds.items()}
        answers = []
        for cond in conds:
            if cond is None:
                answers.append(torch.zeros_like(x))
                continue
            if id(cond) not in names:
                raise NotLinear("the guider makes up conditioning of its own")
            call.conds.append(names[id(cond)])
            answers.append(self._answers.output(len(self._recording.calls), len(call.conds) - 1, x))
        call.outputs = [answer for answer, cond in zip(answers, conds, strict=True) if cond is not None]
        call.outputs = [output.clone() for output in call.outputs]
        return answers


def run(
    sampler: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], start: Start, answers: Answers
) -> Recording:
    """Run the host's `sampler.sample` with `answers` in place of model and noise."""
    recording = Recording()

    def noise(drawn: Tensor | None) -> Tensor:
        answer = answers.noise(len(recording.noises), drawn)
        recording.noises.append(answer.clone())
        recording.noise_born.append(len(recording.calls))
        return answer

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        recording.previews.append((len(recording.calls) - 1, step, total, denoised.clone()))

    tap = Tap(start.noise.shape, noise, real=answers.real)
    sampler = copy.copy(sampler)
    options = getattr(sampler, "extra_options", {})
    if callable(options.get("noise_sampler")):
        sampler.extra_options = options | {"noise_sampler": tap.noise_sampler(options["noise_sampler"])}
    stand_in = _Guider(guider, answers, recording)
    model_options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
    wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    wrappers[WrappersMP.CALC_COND_BATCH] = {"comfy-xdit.trace": [stand_in.evaluate]}
    # Copies: samplers write into their arguments (uni_pc into sigmas, CFG++ into the options).
    args = extra_args | {"model_options": model_options}
    given = [start.noise.clone(), start.latent.clone(), start.mask]
    with tap.open():
        recording.output = sampler.sample(stand_in, sigmas.clone(), args, callback, *given, True)
    return recording


class _Numbers:
    """Random answers that depend on the input in no linear way."""

    real = False

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self._random = np.random.default_rng(0)
        self._shape = tuple(shape)
        self._device = device

    def draw(self) -> Tensor:
        # NumPy's, so that the draw is neither tapped nor taken from torch's global state.
        return torch.from_numpy(self._random.standard_normal(self._shape)).to(self._device)

    def noise(self, j: int, drawn: Tensor | None) -> Tensor:
        return self.draw() if drawn is None else self.draw().to(drawn.dtype)

    def output(self, i: int, k: int, x: Tensor) -> Tensor:
        return self.draw() + torch.tanh(x) / (1 + k)

    def guided(self, i: int, made: Tensor) -> Tensor:
        return made


class _Coordinates:
    """A basis vector for each answer that a run on numbers got."""

    real = False

    def __init__(self, seen: Recording, num_dims: int, device: torch.device) -> None:
        columns = [Column(term="noise", born=None), Column(term="latent", born=None)]
        for i, call in enumerate(seen.calls):
            columns.append(Column(term=f"d{i}", born=i + 1))
            columns += [Column(term=f"e{i}.{k}", born=i + 1) for k in range(len(call.conds))]
        columns += [Column(term=f"n{j}", born=born) for j, born in enumerate(seen.noise_born)]
        self.columns = columns
        self._index = {column.term: j for j, column in enumerate(columns)}
        self._shape = (1,) * (num_dims - 1) + (len(columns),)
        self._device = device

    def vector(self, term: str) -> Tensor:
        if term not in self._index:
            raise NotLinear("the sampler takes other steps when the numbers are others")
        vector = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        vector[..., self._index[term]] = 1.0
        return vector

    def noise(self, j: int, drawn: Tensor | None) -> Tensor:
        vector = self.vector(f"n{j}")
        return vector if drawn is None else vector.to(drawn.dtype)

    def output(self, i: int, k: int, x: Tensor) -> Tensor:
        return self.vector(f"e{i}.{k}")

    def guided(self, i: int, made: Tensor) -> Tensor:
        return self.vector(f"d{i}")


def trace(
    sampler: Any,
    guider: Any,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any],
    num_dims: int,
    masked: bool = False,
) -> SamplerProgram:
    """The program of `sampler.sample` as the host's guider is about to call it.

    guider: as inside its `inner_sample` (with `inner_model` and `conds`). extra_args: with "model_options"
    and "seed". num_dims: of the latent. masked: whether there is an inpaint mask.
    Leaves the state of the random generators as it was; the model is not evaluated.
    Raises NotLinear, with the reason, when the run has to stay in the host's loop.
    """
    # MPS knows no float64; the coefficients don't depend on where they are found.
    device = sigmas.device if sigmas.device.type in ("cpu", "cuda") else torch.device("cpu")
    sigmas = sigmas.to(device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        try:
            return _trace(sampler, guider, sigmas, extra_args, num_dims, masked)
        except (NotLinear, InterruptProcessingException):
            raise
        except Exception as error:
            # A sampler of any author, given tensors it never saw: whatever it raises, step mode takes it.
            raise NotLinear(f"the sampler fails in a trace: {type(error).__name__}: {error}") from error


def _trace(
    sampler: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], num_dims: int, masked: bool
) -> SamplerProgram:
    def execute(start: Start, answers: Answers) -> Recording:
        return run(sampler, guider, sigmas, extra_args, start, answers)

    numbers = _Numbers(torch.Size((2, *range(3, 2 + num_dims))), sigmas.device)
    random_mask = (numbers.draw() * 0.5 + 0.5).clamp(0.0, 1.0) if masked else None
    start = Start(noise=numbers.draw(), latent=numbers.draw(), mask=random_mask)
    seen = execute(start, numbers)

    coordinates = _Coordinates(seen, num_dims, sigmas.device)
    basis = {"noise": coordinates.vector("noise"), "latent": coordinates.vector("latent")}
    masks = [torch.full_like(basis["noise"], value) for value in (1.0, 0.0)] if masked else [None, None]
    made = execute(Start(**basis, mask=masks[0]), coordinates)
    known = execute(Start(**basis, mask=masks[1]), coordinates) if masked else None
    for other in (made, known or made):
        if other.shape != seen.shape:
            raise NotLinear("the sampler takes other steps when the numbers are others")
    program = _program(made, known, coordinates.columns, guider.inner_model.model_sampling, sigmas.device)
    _check(program, seen, start)
    return program


def _program(
    made: Recording, known: Recording | None, columns: list[Column], model_sampling: Any, device: torch.device
) -> SamplerProgram:
    """The recorded rows, each over the terms that are latest."""
    history = History(columns)
    conds = list(dict.fromkeys(name for call in made.calls for name in call.conds))
    calls, previews = [], []
    for i, call in enumerate(made.calls):
        history_row = _row(call.x)
        short = history.shorten(history_row)
        history.add_input(history_row)
        calls.append(
            SamplerCall(
                sigma=call.sigma,
                input=short,
                known={} if known is None else _named(_row(known.calls[i].x), columns),
                conds=[conds.index(name) for name in call.conds],
                guide=_guide(call, i, history_row, columns),
                **model_terms(model_sampling, call.sigma, device),
            )
        )
        for after, step, total, denoised in made.previews:
            if after == i:
                row = history.shorten(_row(denoised))
                previews.append(SamplerPreview(after=after, step=step, total=total, denoised=row))
    assert made.output is not None
    output = history.shorten(_row(made.output))
    return SamplerProgram(conds=conds, calls=calls, previews=previews, output=output)


def _row(coordinates: Tensor) -> np.ndarray:
    row = coordinates.reshape(-1).double().cpu().numpy()
    if not np.isfinite(row).all():
        raise NotLinear("the sampler makes infinite coefficients")
    return row


def _named(row: np.ndarray, columns: list[Column]) -> dict[str, float]:
    return {columns[j].term: float(row[j]) for j in np.flatnonzero(row)}


def _guide(call: Call, i: int, x: np.ndarray, columns: list[Column]) -> dict[str, float]:
    """How the guider combined its conditionings' latents, and perhaps its input."""
    row = _row(call.guided)
    own = {f"e{i}.{k}": str(k) for k in range(len(call.conds))}
    named = _named(row, columns)
    guide = {name: named[term] for term, name in own.items() if term in named}
    rest = np.where([column.term in own for column in columns], 0.0, row)
    if np.abs(rest).max(initial=0.0) > 0.0:
        share = float(rest @ x / (x @ x))
        if np.abs(rest - share * x).max() > 1e-10 * np.abs(rest).max():
            raise NotLinear("the guider mixes in what it remembers of earlier steps")
        guide["x"] = share
    return guide


def _check(program: SamplerProgram, seen: Recording, start: Start) -> None:
    """Replay the run on numbers. Raises NotLinear when the host's sampler came to something else."""
    given = {"noise": start.noise, "latent": start.latent, "mask": start.mask, "noises": seen.noises}
    replay = Replay(program, **given, dtype=torch.float64)
    assert seen.output is not None
    pairs = []
    previews = iter(seen.previews)
    for i, call in enumerate(seen.calls):
        pairs.append((replay.input(i), call.x))
        replay.answer(i, call.outputs)
        pairs += [(progress.denoised, next(previews)[3]) for progress in replay.previews(i)]
    pairs.append((replay.output(), seen.output))
    for ours, host in pairs:
        if not (ours - host).abs().max() <= AGREEMENT * host.abs().max().clamp(min=1e-30):
            raise NotLinear("the sampler's result is no weighted sum of the model's answers and its noise")
