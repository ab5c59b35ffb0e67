"""A sampler's run as a linear program: data that travels, and its replay on the workers.

A sampler only ever scales and adds: each input of the model is a weighted sum of tensors that were
there before. The host finds the weights once; a worker that has them can run the whole loop, on the
latent or on any slice of it, with no sampler code of its own.

Terms, by name:
    "noise", "latent"   the noise and the (clean) latent that the host gave the sampler
    "n3"                random noise that the sampler drew as its 4th
    "x2"                the sampler's state, as it went into call 2
    "d2"                the guided denoised latent that call 2 gave back to the sampler
    "e2.1"              denoised latent of one conditioning alone in call 2 (samplers of the CFG++ kind)

How a worker runs one (every rank its own slice, or all of them the whole):

    replay = Replay(program, noise=noise, latent=latent, noises=noises, mask=mask)
    for i, call in enumerate(program.calls):
        x = replay.model_input(i)                            # float32; cast to the model's dtype
        outputs = [model(x, call.timestep, conditioning[program.conds[k]]) for k in call.conds]
        replay.answer(i, replay.denoised(i, outputs))        # cfg is applied here, by `call.guide`
        for preview in replay.previews(i):
            stream(preview.step, preview.total, preview.denoised)
    samples = replay.output()

For PipeFusion each patch has a Replay of its own, over the patch's slices of `noise`, `latent`, the
noises and `mask`; patches may be at different calls. All arithmetic is elementwise, one rounding an
operation, so a slice replays bit for bit as the whole does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .messages import Message

Row = dict[str, float]
"""Term → coefficient. Summed in the order of the dict, which JSON keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerCall(Message):
    """One evaluation of the guided model.

    sigma: the noise level; timestep: what the network is given for it, before the family's own scaling.
    input: row of the sampler's state, over terms of earlier calls.
    known: with a mask, row of the noised known latent, over "noise", "latent" and "n…".
    The network is given input_scale · x. A conditioning's denoised latent is skip · x + gain · output.
    conds: indices into `SamplerProgram.conds`, in the order of the outputs; more than one means that
    they may run side by side. guide: the guided latent as a row over "0", "1", … (the outputs'
    denoised latents) and "x"; with a mask the known latent is then put back.
    """

    sigma: float
    timestep: float
    input: Row
    known: Row
    input_scale: float
    skip: float
    gain: float
    conds: list[int]
    guide: Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerPreview(Message):
    """The sampler reports progress once call `after` is answered: `step` of `total`, and a row."""

    after: int
    step: int
    total: int
    denoised: Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerProgram(Message):
    """A whole run. conds: names of the conditionings that calls refer to ("positive", "negative", …).

    output: row of what the host's `Sampler.sample` returns (inverse noise scaling included).
    Raises ValueError when a row uses a term that does not exist at its time.
    """

    conds: list[str]
    calls: list[SamplerCall]
    previews: list[SamplerPreview]
    output: Row

    def __post_init__(self) -> None:
        for time, row in self._rows():
            for term in row:
                if not _exists(term, time):
                    raise ValueError(f"the sampler program uses {term!r} at time {time}, before it is known")

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(time, row): call i has its input at 2·i and its answer and previews at 2·i + 1."""
        for i, call in enumerate(self.calls):
            yield 2 * i, call.input
            yield 2 * i, call.known
        for preview in self.previews:
            yield 2 * preview.after + 1, preview.denoised
        yield 2 * len(self.calls), self.output

    def last_use(self) -> dict[str, int]:
        """Term → the last time a row reads it: 2·i for the input of call i, 2·i + 1 for its previews."""
        last: dict[str, int] = {}
        for time, row in self._rows():
            for term in row:
                last[term] = max(last.get(term, -1), time)
        return last

    def noises(self) -> list[int]:
        """Which of the drawn noises are ever read; the others need not travel."""
        return sorted(int(term[1:]) for term in self.last_use() if term[0] == "n" and term != "noise")

    def peak_held(self) -> int:
        """The most tensors of a latent's size that a replay holds while the model runs.

        The call's own input counts (twice where a mask keeps it apart from the sampler's state);
        "noise", "latent" and "n…" don't: they came with the job.
        """
        last = self.last_use()
        peak = 0
        for i in range(len(self.calls)):
            terms = [term for term in last if _born(term) is not None]
            kept = [term for term in terms if (_born(term) or 0) < 2 * i < last[term]]
            beside = bool(self.calls[i].known) and f"x{i}" in last
            peak = max(peak, len(kept) + 1 + beside)
        return peak


def _born(term: str) -> int | None:
    """When a replay makes a term: "x3" at 6, "d3" and "e3.0" at 7; None for what comes with the job."""
    if term in ("noise", "latent") or term[0] == "n":
        return None
    index = int(term[1:].partition(".")[0])
    return 2 * index + (term[0] in "de")


def _exists(term: str, time: int) -> bool:
    if term in ("noise", "latent") or (term[:1] == "n" and term[1:].isdigit()):
        return True
    index, _, cond = term[1:].partition(".")
    shaped = index.isdigit() and (cond.isdigit() if term[:1] == "e" else not cond)
    return term[:1] in ("x", "d", "e") and shaped and 2 * int(index) < time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A preview with its tensor."""

    step: int
    total: int
    denoised: Tensor


class Replay:
    """Runs a program on one slice of the latent; calls in order, each `answer` after its `input`.

    noise, latent, mask: the slice's part of each (mask: 1 where the latent is made anew, or None).
    noises: index → the slice's part of that noise; asked for when needed, each index possibly again.
    dtype: what is held, float32 as on the host. Sums are made in float64 and rounded once.
    keep: hold every term to the end (to check that letting go of them changes nothing).
    """

    def __init__(
        self,
        program: SamplerProgram,
        *,
        noise: Tensor,
        latent: Tensor,
        noises: Mapping[int, Tensor] | Sequence[Tensor | None] | Callable[[int], Tensor] = (),
        mask: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        keep: bool = False,
    ) -> None:
        self.program = program
        self._given = {"noise": noise, "latent": latent}
        self._noises = noises
        self._mask = mask
        self._dtype = dtype
        self._last = program.last_use()
        self._keep = keep
        self._held: dict[str, Tensor] = {}
        self._input: Tensor | None = None
        self._answered = 0

    def input(self, i: int) -> Tensor:
        """x of call i as the host's guider would get it; float32 (`dtype`), shape of the slice."""
        if self._input is None:
            assert i == self._answered, f"call {i} asked for while call {self._answered} is next"
            call = self.program.calls[i]
            state = self._sum(call.input)
            if f"x{i}" in self._last:
                self._held[f"x{i}"] = state
            self._input = state if self._mask is None else self._blend(state, self._sum(call.known))
            self._release(2 * i)
        return self._input

    def model_input(self, i: int) -> Tensor:
        """What the network is given: the input, scaled as the host's model sampling does."""
        scale = self.program.calls[i].input_scale
        x = self.input(i)
        return x if scale == 1.0 else (x.double() * scale).to(self._dtype)

    def denoised(self, i: int, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The denoised latent of each conditioning, from the network's outputs for `model_input(i)`."""
        call, x = self.program.calls[i], self.input(i).double()
        return [(x * call.skip + output.double() * call.gain).to(self._dtype) for output in outputs]

    def answer(self, i: int, denoised: Sequence[Tensor]) -> None:
        """Take the denoised latents of call i, one per index in its `conds`."""
        call = self.program.calls[i]
        assert len(denoised) == len(call.conds), f"{len(denoised)} outputs, not {len(call.conds)}"
        terms = {str(k): tensor for k, tensor in enumerate(denoised)} | {"x": self.input(i)}
        guided = self._sum(call.guide, terms)
        if self._mask is not None:
            guided = self._blend(guided, self._given["latent"])
        fresh = {f"d{i}": guided} | {f"e{i}.{k}": tensor for k, tensor in enumerate(denoised)}
        self._held.update({term: tensor for term, tensor in fresh.items() if term in self._last})
        self._input = None
        self._answered = i + 1

    def previews(self, i: int) -> list[Progress]:
        """What the sampler reports once call i is answered; ask before the input of call i + 1."""
        assert self._answered == i + 1, f"previews of call {i} asked for after call {self._answered - 1}"
        due = [preview for preview in self.program.previews if preview.after == i]
        made = [Progress(step=p.step, total=p.total, denoised=self._sum(p.denoised)) for p in due]
        self._release(2 * i + 1)
        return made

    def output(self) -> Tensor:
        """What the host's sampler would return; after the last answer."""
        assert self._answered == len(self.program.calls), f"only {self._answered} calls are answered"
        return self._sum(self.program.output)

    @property
    def num_held(self) -> int:
        """Tensors held now, the current input included."""
        distinct = {id(tensor) for tensor in self._held.values()}
        return len(distinct | {id(self._input)} if self._input is not None else distinct)

    def _sum(self, row: Row, terms: Mapping[str, Tensor] | None = None) -> Tensor:
        total: Tensor | None = None
        for term, coefficient in row.items():
            # Multiplied, then added: a fused kernel rounds differently at the end of a slice.
            part = (self._term(term) if terms is None else terms[term]).double() * coefficient
            total = part if total is None else total + part
        if total is None:
            return torch.zeros_like(self._given["noise"], dtype=self._dtype)
        return total.to(self._dtype)

    def _term(self, term: str) -> Tensor:
        if term in self._given:
            return self._given[term]
        if term in self._held:
            return self._held[term]
        index = int(term[1:])
        noise = self._noises(index) if callable(self._noises) else self._noises[index]
        assert noise is not None, f"noise {index} did not come with the job"
        return noise

    def _blend(self, made: Tensor, known: Tensor) -> Tensor:
        """made where the mask is 1, known where it is 0; as the host does it for masks in between."""
        assert self._mask is not None
        mask = self._mask.double()
        return (made.double() * mask + known.double() * (1.0 - mask)).to(self._dtype)

    def _release(self, time: int) -> None:
        if not self._keep:
            for term in [term for term in self._held if self._last[term] <= time]:
                del self._held[term]
