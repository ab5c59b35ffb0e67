"""A sampler's run as a program: data that travels, and its replay on the workers.

Between two evaluations of the model a sampler only scales, adds and blends tensors of the latent's shape. The
host's run is recorded operation by operation (`sampler_recorder.py`); a worker that has the record can run the whole
loop, on the latent or on any slice of it, with no sampler code of its own, and rounds as the host does.

Values, by name:
    "noise", "latent", "mask"   what the host gave the sampler; the mask is 1 where the latent is made anew
    "n3"                        random noise that the sampler drew as its 4th
    "o2.1"                      what the network made, in call 2, of the call's second conditioning
    "v17"                       the result of an operation

How a worker runs one (every rank its own slice, or all of them the whole):

    replay = Replay(program, noise=noise, latent=latent, noises=noises, mask=mask)
    for i, call in enumerate(program.calls):
        x = replay.model_input(i)                            # float32; cast to the model's dtype
        outputs = [model(x, call.timestep, conditioning[program.conds[k]]) for k in call.conds]
        replay.answer(i, outputs)                            # in float32 again
        for preview in replay.previews(i):
            stream(preview.step, preview.total, preview.denoised)
    samples = replay.output()

For PipeFusion each patch has a Replay of its own, over the patch's slices of `noise`, `latent`, the
noises and `mask`; patches may be at different calls. All arithmetic is elementwise, one rounding an
operation, so a slice replays bit for bit as the whole does.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .encoding import Message
from .errors import InputError

DTYPES = ("float16", "bfloat16", "float32", "float64")


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "clamp": torch.clamp,
    **{f"to_{name}": _to(getattr(torch, name)) for name in DTYPES},
}
"""What an operation may be. Python's operators, so that a number on either side acts as on the host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Message):
    """A tensor of the host's with the same number everywhere. Its dtype and number of dims count in type promotion."""

    value: float
    dtype: str
    num_dims: int

    def tensor(self, device: torch.device | str) -> Tensor:
        """One number, with so many dims of length 1."""
        return torch.full((1,) * self.num_dims, self.value, dtype=getattr(torch, self.dtype), device=device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation(Message):
    """result = function(*operands). operands: names of values, numbers, None, and constants."""

    function: str
    operands: list[Any]
    result: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerCall(Message):
    """One evaluation of the model.

    before: what is computed first. x: the value that the network is given, in the model's dtype.
    sigma: the noise level; timestep: what the network is given for it, before the family's own scaling.
    conds: indices into `SamplerProgram.conds`, in the order of the outputs; more than one means that
    they may run side by side.
    """

    before: list[Operation]
    x: str
    sigma: float
    timestep: float
    conds: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerPreview(Message):
    """The sampler reports progress once call `after` is answered: `step` of `total`, and a value."""

    after: int
    step: int
    total: int
    denoised: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerProgram(Message):
    """A whole run. conds: names of the conditionings that calls refer to ("positive", "negative", …).

    after: what is computed after the last call. output: the value that the host's `Sampler.sample` returns
    (inverse noise scaling included).
    Raises InputError for an unknown function, and when a value is used that does not exist at its time.
    """

    conds: list[str]
    calls: list[SamplerCall]
    previews: list[SamplerPreview]
    after: list[Operation]
    output: str

    def __post_init__(self) -> None:
        known = set[str]()
        read = self.read_at()
        for time, operations in enumerate(self.segments()):
            if time:
                known |= {f"o{time - 1}.{k}" for k in range(len(self.calls[time - 1].conds))}
            for operation in operations:
                if operation.function not in FUNCTIONS:
                    raise InputError(f"the sampler program uses {operation.function!r}, which is no known operation")
                self._require(known, time, *_names(operation))
                known.add(operation.result)
            self._require(known, time, *read[time])

    def _require(self, known: set[str], time: int, *names: str) -> None:
        for name in names:
            if not _is_given(name) and name not in known:
                raise InputError(f"the sampler program uses {name!r} before call {time}, where it is not known yet")

    def segments(self) -> Iterator[list[Operation]]:
        """The operations before each call, then those after the last."""
        yield from (call.before for call in self.calls)
        yield self.after

    def read_at(self) -> list[list[str]]:
        """What is read when the operations of each segment are done: by previews, then by the network or the host.

        Raises ValueError for a preview of a call that there is not.
        """
        read: list[list[str]] = [[] for _ in range(len(self.calls) + 1)]
        for preview in self.previews:
            if not 0 <= preview.after < len(self.calls):
                raise ValueError(
                    f"the sampler program reports a step after call {preview.after} of {len(self.calls)}"
                )
            read[preview.after + 1].append(preview.denoised)
        for names, last in zip(read, [*(call.x for call in self.calls), self.output], strict=True):
            names.append(last)
        return read

    def reads(self) -> Counter[str]:
        """Value → how often it is read."""
        count = Counter(itertools.chain.from_iterable(self.read_at()))
        for operations in self.segments():
            for operation in operations:
                count.update(_names(operation))
        return count

    def noises(self) -> list[int]:
        """Which of the drawn noises are ever read; the others need not travel."""
        return sorted(int(name[1:]) for name in self.reads() if _is_noise(name))

    def peak_held(self) -> int:
        """The most tensors of a latent's size that a replay holds while the model runs, the call's own input included.

        "noise", "latent", "mask" and "n…" don't count: they came with the job.
        """
        born, last = dict[str, int](), dict[str, int]()
        read = self.read_at()
        for time, operations in enumerate(self.segments()):
            for operation in operations:
                born[operation.result] = time
                last.update(dict.fromkeys(_names(operation), time))
            last.update(dict.fromkeys(read[time], time))
            if time < len(self.calls):
                born |= {f"o{time}.{k}": time + 1 for k in range(len(self.calls[time].conds))}
        peak = 0
        for time, call in enumerate(self.calls):
            kept = {name for name, begin in born.items() if begin <= time < last.get(name, -1)}
            peak = max(peak, len(kept | {call.x}))
        return peak


def _names(operation: Operation) -> list[str]:
    return [operand for operand in operation.operands if isinstance(operand, str)]


def _is_noise(name: str) -> bool:
    return name[:1] == "n" and name[1:].isdigit()


def _is_given(name: str) -> bool:
    return name in ("noise", "latent", "mask") or _is_noise(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A preview with its tensor."""

    step: int
    total: int
    denoised: Tensor


class Replay:
    """Runs a program on one slice of the latent; calls in order, each `answer` after its `model_input`.

    noise, latent, mask: the slice's part of each (mask: None where the program reads none).
    noises: index → the slice's part of that noise; asked for when needed, each index possibly again.
    dtype: what is held, float32 as on the host.
    keep: hold every value to the end (to check that letting go of them changes nothing).
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
        self._given = {"noise": noise, "latent": latent, "mask": mask}
        self._noises = noises
        self._dtype = dtype
        self._keep = keep
        self._unread = program.reads()
        self._held: dict[str, Tensor] = {}
        self._constants: dict[Constant, Tensor] = {}
        self._segments = list(program.segments())
        self._due: list[list[SamplerPreview]] = [[] for _ in self._segments]
        for preview in program.previews:
            self._due[preview.after + 1].append(preview)
        self._answered = 0
        self._shown: list[Progress] = []
        self._now = self._run()

    def model_input(self, i: int) -> Tensor:
        """What the network is given in call i: float32 (`dtype`), shape of the slice. Not to be written into."""
        assert i == self._answered, f"call {i} asked for while call {self._answered} is next"
        return self._now

    def answer(self, i: int, outputs: Sequence[Tensor]) -> None:
        """Take what the network made in call i, one tensor per index in its `conds`, and go on to the next call."""
        call = self.program.calls[i]
        assert i == self._answered, f"call {i} answered while call {self._answered} is next"
        assert len(outputs) == len(call.conds), f"{len(outputs)} outputs, not {len(call.conds)}"
        # Copies: the network may write its next output where this one is.
        named = {f"o{i}.{k}": output.to(self._dtype, copy=True) for k, output in enumerate(outputs)}
        self._held.update({name: output for name, output in named.items() if self._unread[name]})
        self._answered = i + 1
        self._now = self._run()

    def previews(self, i: int) -> list[Progress]:
        """What the sampler reports once call i is answered; ask before call i + 1 is."""
        assert self._answered == i + 1, f"previews of call {i} asked for after call {self._answered - 1}"
        return self._shown

    def output(self) -> Tensor:
        """What the host's sampler would return; after the last answer."""
        assert self._answered == len(self.program.calls), f"only {self._answered} calls are answered"
        return self._now

    @property
    def num_held(self) -> int:
        """Tensors held now, the network's input included."""
        return len({id(tensor) for tensor in (*self._held.values(), self._now)})

    def _run(self) -> Tensor:
        """The sampler's work up to its next call, or its end: the network's input, or the output."""
        time = self._answered
        for operation in self._segments[time]:
            made = FUNCTIONS[operation.function](*[self._read(operand) for operand in operation.operands])
            self._held[operation.result] = made
        self._shown = [
            Progress(step=p.step, total=p.total, denoised=self._read(p.denoised)) for p in self._due[time]
        ]
        calls = self.program.calls
        return self._read(calls[time].x if time < len(calls) else self.program.output)

    def _read(self, operand: Any) -> Any:
        """An operand, of which nothing is kept that is not read again."""
        if isinstance(operand, Constant):
            return self._constant(operand)
        if not isinstance(operand, str):
            return operand
        self._unread[operand] -= 1
        if _is_given(operand):
            return self._received(operand).to(self._dtype)
        done = self._unread[operand] == 0 and not self._keep
        return self._held.pop(operand) if done else self._held[operand]

    def _received(self, name: str) -> Tensor:
        if name in self._given:
            received = self._given[name]
            assert received is not None, f"the job came without a {name}"
            return received
        index = int(name[1:])
        noise = self._noises(index) if callable(self._noises) else self._noises[index]
        assert noise is not None, f"noise {index} did not come with the job"
        return noise

    def _constant(self, constant: Constant) -> Tensor:
        if constant not in self._constants:
            self._constants[constant] = constant.tensor(self._received("noise").device)
        return self._constants[constant]
