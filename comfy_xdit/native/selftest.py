"""Whether a family's plan holds for the ComfyUI at hand: its own classes, tiny, on N ranks against one.

A plan is written for what a model's code did when it was read. Another version may join text and image in the other
order, and the picture is wrong without an error. So the real class is made with few and small blocks and random
weights, called with every argument that the family names, and compared. The ranks are threads (`thread_ranks.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.attention import Layer, SequenceAttention
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.cut import cut
from comfy_xdit.parallel.latent_tokens import LatentTokens
from comfy_xdit.parallel.model import num_rows
from comfy_xdit.parallel.patch_rows import cut_rows, pixel_rows
from comfy_xdit.parallel.patch_tokens import PatchTokens
from comfy_xdit.parallel.spec import ModelShape, ParallelSpec
from comfy_xdit.parallel.stale import StaleAttention
from comfy_xdit.parallel.tensor import keep_own_shards
from comfy_xdit.parallel.thread_ranks import on_threads
from comfy_xdit.parallel.tokens import TokenPlan
from comfy_xdit.parallel.whole_shaped import whole_shaped

from .calls import as_given, as_sent
from .family import ComfyFamily
from .subject import Call, Config, Subject, build, cases, exists

LIMIT = 1e-4
"""The largest relative difference of N ranks from one, in fp32: roundings stay a hundred times below it."""

SPECS = (ParallelSpec(ulysses=2), ParallelSpec(ring=3))

NUM_PATCHES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one call. error: relative, the worst rank's; infinite where it failed, and `why` says how."""

    call: str
    error: float
    why: str = ""

    @property
    def holds(self) -> bool:
        return self.error <= LIMIT


def selftest(
    family: ComfyFamily,
    subjects: Iterable[Subject],
    specs: Sequence[ParallelSpec] | None = None,
    real: dict[str, Config] | None = None,
) -> list[Outcome]:
    """Each call of each subject on each spec; none where this ComfyUI has none of the kinds.

    specs: None for `SPECS`, tensor where there is a plan for it, and each row of a batch by itself, as cfg and dp do.
    real: kind → the configuration of a file that is to be run; the other kinds are then left out.
    Nothing is raised for what a model or the plan does. ComfyUI must be imported, for a CPU and with torch's attention.
    """
    return list(outcomes_of(family, subjects, specs, real))


def outcomes_of(
    family: ComfyFamily,
    subjects: Iterable[Subject],
    specs: Sequence[ParallelSpec] | None = None,
    real: dict[str, Config] | None = None,
) -> Iterator[Outcome]:
    """As `selftest`, one after the other."""
    for subject, config in cases(subjects, real):
        if exists(subject.kind):
            yield from _outcomes(family, subject, specs, config)


def verdict(family: ComfyFamily, outcomes: Iterable[Outcome], version: str) -> str:
    """Why the family is refused with this ComfyUI, "" where it is not."""
    failed = next((outcome for outcome in outcomes if not outcome.holds), None)
    if failed is None:
        return ""
    how = failed.why or f"another result, by {failed.error:.1e}"
    return (
        f"{family.title} is not run on several GPUs with ComfyUI {version}: its self-test failed at {failed.call} "
        f"({how}); use a pool of one device, or another version of ComfyUI"
    )


def _outcomes(
    family: ComfyFamily, subject: Subject, specs: Sequence[ParallelSpec] | None, config: Config
) -> Iterator[Outcome]:
    try:
        trial = Trial(model=build(subject.kind, config), plan=family.plan)
        shape = family.shape(trial.model)
        calls = subject.calls(config)
        refused = subject.refused(config) if subject.refused else {}
    except Exception as error:
        _raise_for_memory(error)
        yield Outcome(call=f"{subject.kind}, which could not be made", error=math.inf, why=_text(error))
        return
    for name, call in {**calls, **refused}.items():
        title = f"{subject.kind} {name}"
        try:
            expected = on_one(trial.model, call)
        except Exception as error:
            _raise_for_memory(error)
            yield Outcome(call=f"{title} on one rank", error=math.inf, why=_text(error))
            continue
        for spec in _usual(shape) if specs is None else specs:
            if name in refused and spec.tensor > 1:
                continue
            if name in refused:
                why = trial.why_not_refused(call, spec)
                yield Outcome(call=f"{title} on {spec}, refused", error=math.inf if why else 0.0, why=why)
                continue
            difference, why = trial.compared(call, spec, expected)
            yield Outcome(call=f"{title} on {spec}", error=difference, why=why)
        if specs is None and name not in refused and num_rows(call) > 1:
            difference, why = trial.by_rows(family, call, expected)
            yield Outcome(call=f"{title} row by row, as on cfg and dp", error=difference, why=why)
        found = None if name in refused else trial.in_patches(family, call, expected)
        if found is not None:
            yield Outcome(call=f"{title} in patches", error=found[0], why=found[1])
    if trial.heads and shape.num_heads != min(trial.heads):
        why = f"{shape.num_heads} heads, of which attention has {sorted(trial.heads)}"
        yield Outcome(call=f"{subject.kind}'s number of heads", error=math.inf, why=why)


def _usual(shape: ModelShape) -> list[ParallelSpec]:
    """The specs to be tried; of tensor the least degree that cuts the model."""
    degrees = [degree for degree in range(2, shape.tensor_divides + 1) if shape.tensor_divides % degree == 0]
    return [*SPECS, *(ParallelSpec(tensor=degree) for degree in degrees[:1])]


def on_one(model: nn.Module, call: Call) -> list[Tensor]:
    """What the model gives by itself. Raises ValueError where that shows nothing."""
    with torch.inference_mode():
        out = _tensors(run(model, call))
    if not all(part.isfinite().all() and part.std() > 0 for part in out):
        raise ValueError("the tiny model gives no usable numbers")
    return out


@dataclasses.dataclass(kw_only=True)
class Trial:
    """A model under a plan, on several ranks. heads: of each kind of attention that came by."""

    model: nn.Module
    plan: TokenPlan
    heads: set[int] = dataclasses.field(default_factory=set)

    def compared(self, call: Call, spec: ParallelSpec, expected: list[Tensor]) -> tuple[float, str]:
        """The relative difference of the worst rank, and why it is infinite where it is."""

        try:
            answers = on_threads(spec, lambda context: self._on_rank(call, context))
        except Exception as error:
            _raise_for_memory(error)
            return math.inf, _text(error)
        return _difference([pair for out in answers for pair in zip(out, expected, strict=True)])

    def in_patches(self, family: ComfyFamily, call: Call, expected: list[Tensor]) -> tuple[float, str] | None:
        """As `compared`, on one rank: patch after patch, beside keys that are kept of the same call.

        So none of them is old, and a difference says that a patch is not where the family says. None where it says
        that the latent can't be cut.
        """
        try:
            latent = family.latent_tokens(self.model, call)
            if latent is None:
                return None
            made = on_threads(ParallelSpec(), lambda context: self._patched(call, latent, context))
        except Exception as error:
            _raise_for_memory(error)
            return math.inf, _text(error)
        return _difference(list(zip(made, expected, strict=True)))

    def by_rows(self, family: ComfyFamily, call: Call, expected: list[Tensor]) -> tuple[float, str]:
        """As `compared`, of the calls that the family makes of each row of the batch."""
        sent, pairs = {name: as_sent(value) for name, value in call.items()}, []
        try:
            for row in range(num_rows(call)):
                one = {name: as_given(value) for name, value in family.of_rows(sent, range(row, row + 1)).items()}
                wanted = [part[row : row + 1] for part in expected]
                pairs += list(zip(on_one(self.model, one), wanted, strict=True))
        except Exception as error:
            _raise_for_memory(error)
            return math.inf, _text(error)
        return _difference(pairs)

    def why_not_refused(self, call: Call, spec: ParallelSpec) -> str:
        """"" where the plan refuses the call."""
        try:
            on_threads(spec, lambda context: self._on_rank(call, context))
        except InputError:
            return ""
        except Exception as error:
            return _text(error)
        return "it was not refused"

    def _on_rank(self, call: Call, context: ParallelContext) -> list[Tensor]:
        method = SequenceAttention(context)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: Layer, **more: Any) -> Tensor:
            self.heads.add(q.shape[1])
            return method(q, k, v, layer, **more)

        model, share = _twin(self.model), context.spec.weights_of(context.rank)
        with torch.inference_mode():
            if share.num_shards > 1:
                assert self.plan.tensor is not None
                keep_own_shards(model, self.plan.tensor, share)
            with cut(model, self.plan, context, attend):
                out = _tensors(run(model, call))
        if not context.traffic.bytes:
            raise ValueError("nothing was cut")
        return out

    def _patched(self, call: Call, latent: LatentTokens, context: ParallelContext) -> Tensor:
        keys, twin, (batch, *_, height, _) = StaleAttention(context), _twin(self.model), call["x"].shape
        parts = cut_rows(latent.grid, num_patches=NUM_PATCHES, num_stages=1, num_shards=1)
        made = []
        with torch.inference_mode(), keys, whole_shaped(twin, self.plan, context, keys) as engine:
            keys.begin("call", keep=True, first=0, num_rows=batch)
            run(twin, call)
            for number, rows in enumerate(parts):
                engine.patch = PatchTokens(number=number, num=len(parts), rows=rows, latent=latent)
                made.append(run(twin, call)[..., pixel_rows(latent.grid, rows, height), :])
        return torch.cat(made, -2)


def run(model: nn.Module, call: Call) -> Any:
    """One evaluation, with a copy of the call: models write into what they are given."""
    named = {"transformer_options": {}, **copy.deepcopy(call)}
    return model(named.pop("x"), named.pop("timestep"), **named)


def _twin(model: nn.Module) -> nn.Module:
    """A module with the same weights, to which hooks can be added."""
    return copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})


def _difference(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, str]:
    """The largest relative one of (got, wanted), and why it is infinite where it is."""
    if any(got.shape != wanted.shape for got, wanted in pairs):
        return math.inf, "an output of another size"
    worst = max(((got - wanted).norm() / wanted.norm()).item() for got, wanted in pairs)
    return (worst, "") if math.isfinite(worst) else (math.inf, "numbers that are none")


def _tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _raise_for_memory(error: Exception) -> None:
    """A machine without room says nothing of a plan."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        raise error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
