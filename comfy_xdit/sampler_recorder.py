"""Records what a sampler does with its tensors, as a program that workers replay.

A `Traced` tensor is one to all who look at it: it has numbers, a shape, a dtype. Each operation on it is done, and
noted by name. What a program cannot hold is refused where it happens: an operation that is not elementwise, a
look at the numbers (to branch, or to choose a step), a tensor of the sampler's own that is not the same everywhere.

    recorder = SamplerRecorder()
    x = recorder.value("noise")
    for step, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
        cond, uncond = recorder.call(x, sigma=sigma, timestep=sigma, conds=[0, 1])
        denoised = x - sigma * (uncond + 4.0 * (cond - uncond))
        recorder.preview(step, len(sigmas) - 1, denoised)
        x = denoised + (x - denoised) * (lower / sigma)
    program = recorder.program(["positive", "negative"], x)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trajectory import DTYPES, FUNCTIONS, Constant, Operation, SamplerCall, SamplerPreview, SamplerProgram


class NotAProgram(Exception):
    """This run can't be a program; the text says why, to end up in the log."""


SAMPLE = 256
"""So many of the latent's numbers are computed with, to check the record: every operation is elementwise."""


class SamplerRecorder:
    """The record of one run. like: what the latent's shape, dtype and device are."""

    def __init__(self, like: Tensor | None = None) -> None:
        self.like = torch.zeros(1, 1, 1, 1) if like is None else like
        self.calls: list[SamplerCall] = []
        self.previews: list[SamplerPreview] = []
        self._operations: list[Operation] = []
        self._num_results = 0
        self._constants: dict[Constant, Tensor] = {}
        numel = self.like.numel()
        num_places = min(numel, SAMPLE)
        self._places = torch.arange(num_places) * (numel - 1) // max(num_places - 1, 1)
        self._in_order = True

    def sample(self, whole: Tensor) -> Tensor:
        """Numbers of a tensor of the latent's shape, at the same places of each, on the CPU.

        They have as many dims as the latent, since those count in type promotion.
        """
        taken = torch.take(whole, self._places.to(whole.device)).cpu()
        return taken.reshape(*(1,) * (whole.dim() - 1), -1)

    def value(self, name: str, whole: Tensor | None = None) -> Traced:
        """The value `name` that the run is given; zeros where numbers don't matter."""
        if whole is None:
            return self._made(name, self.sample(torch.zeros_like(self.like)))
        self._in_order &= whole.is_contiguous()
        return Traced(self, Cell(name, self.sample(whole)), whole)

    def call(
        self,
        x: Tensor,
        *,
        sigma: float,
        timestep: float,
        conds: Sequence[int],
        network: Callable[[Tensor, int], Tensor] = lambda x, k: torch.zeros_like(x),
    ) -> list[Traced]:
        """Evaluate the network; its outputs. network(x, k): output k for a sample of x's numbers.

        conds: indices into the names that `program` will be given.
        """
        if not isinstance(x, Traced):
            raise NotAProgram("the model is evaluated on something that is not made of the latent and its noise")
        number = len(self.calls)
        self.calls.append(
            SamplerCall(before=self._cut(), x=x.cell.name, sigma=sigma, timestep=timestep, conds=list(conds))
        )
        numbers = x.cell.numbers
        return [self._made(f"o{number}.{k}", network(numbers, k).to(numbers)) for k, _ in enumerate(conds)]

    def preview(self, step: int, total: int, denoised: Tensor) -> None:
        """The sampler reports a step."""
        if not isinstance(denoised, Traced) or not self.calls:
            raise NotAProgram("the sampler reports a step that is not made of the model's answers")
        after = len(self.calls) - 1
        self.previews.append(SamplerPreview(after=after, step=step, total=total, denoised=denoised.cell.name))

    def program(self, conds: Sequence[str], output: Tensor) -> SamplerProgram:
        """What was recorded, without what nobody reads. conds: the names of conditionings."""
        if not isinstance(output, Traced) or not self.calls:
            raise NotAProgram("the sampler's result is not made of the model's answers")
        segments = [*(call.before for call in self.calls), self._cut()]
        needed = {output.cell.name} | {call.x for call in self.calls} | {p.denoised for p in self.previews}
        kept: list[list[Operation]] = []
        for operations in reversed(segments):
            alive = []
            for operation in reversed(operations):
                if operation.result in needed:
                    needed.update(operand for operand in operation.operands if isinstance(operand, str))
                    alive.append(operation)
            kept.insert(0, alive[::-1])
        calls = [dataclasses.replace(call, before=own) for call, own in zip(self.calls, kept[:-1], strict=True)]
        return SamplerProgram(
            conds=list(conds), calls=calls, previews=self.previews, after=kept[-1], output=output.cell.name
        )

    def note(self, function: str, operands: Sequence[Any]) -> Traced:
        """Record an operation, and do it with the samples."""
        named = [self._operand(operand) for operand in operands]
        numbers = FUNCTIONS[function](
            *[self._numbers(operand, name) for operand, name in zip(operands, named, strict=True)]
        )
        result = f"v{self._num_results}"
        self._num_results += 1
        self._operations.append(Operation(function=function, operands=named, result=result))
        if self._in_order:
            return self._made(result, numbers)
        # How the result lies in memory decides in which order random numbers fill a tensor like it.
        return Traced(self, Cell(result, numbers), FUNCTIONS[function](*_shapes(operands)))

    def _made(self, name: str, numbers: Tensor) -> Traced:
        return Traced(self, Cell(name, numbers), self.like, dtype=numbers.dtype)

    def _operand(self, value: Any) -> Any:
        """As a program has it."""
        if not isinstance(value, Tensor):
            number = value if value is None else float(value)
            if number is not None and not math.isfinite(number):
                raise NotAProgram(f"the sampler computes with {number}")
            return number
        self._require_fitting(value.shape)
        if not isinstance(value, Traced):
            return _constant(value)
        if value.recorder is not self:
            raise NotAProgram("the sampler computes with a tensor that it kept of an earlier run")
        return value.cell.name

    def _require_fitting(self, shape: torch.Size) -> None:
        """Raises NotAProgram unless an operation with such a tensor and the latent gives one of the latent's shape."""
        own = self.like.shape
        if shape == own:
            return
        made = torch.broadcast_shapes(shape, own)
        if made != own:
            raise NotAProgram(f"the sampler makes a tensor of {_sizes(made)}, not of the latent's {_sizes(own)}")

    def _numbers(self, operand: Any, name: Any) -> Any:
        if isinstance(operand, Traced):
            return operand.cell.numbers
        if not isinstance(name, Constant):
            return name
        if name not in self._constants:
            self._constants[name] = name.tensor("cpu")
        return self._constants[name]

    def _cut(self) -> list[Operation]:
        operations, self._operations = self._operations, []
        return operations


@dataclasses.dataclass
class Cell:
    """What a traced tensor and its views share: what is in it now, by name and in numbers (see `sample`)."""

    name: str
    numbers: Tensor


class Traced(Tensor):
    """A tensor that a recorder sees; operations on it make others. like: what it looks like from outside."""

    cell: Cell
    recorder: SamplerRecorder

    @staticmethod
    def __new__(
        cls,
        recorder: SamplerRecorder,
        cell: Cell,
        like: Tensor,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Traced:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            like.shape,
            strides=like.stride(),
            dtype=dtype or like.dtype,
            device=device or recorder.like.device,
        )

    def __init__(self, recorder: SamplerRecorder, cell: Cell, *like: Any, **rest: Any) -> None:
        self.recorder = recorder
        self.cell = cell

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Traced({self.cell.name}, {self.cell.numbers})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.stack:
            return Stacked(*args, **(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in FACTORIES:
            return func(*_blank(args), **_blank(kwargs))
        if name in VIEWS:
            return _view(func, args, kwargs)
        in_place = name.endswith("_")
        rule = RULES.get(name.removesuffix("_") if in_place else name)
        if rule is None:
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            raise NotAProgram(_refusal(name))
        try:
            made = rule(*args, **kwargs)
        except TypeError as error:
            raise NotAProgram(f"the sampler uses {name} in a way that a program does not know ({error})") from None
        return _replace(args[0], made) if in_place else made


def _blank(args: Any, device: str | None = None) -> Any:
    """The arguments with tensors that are nothing but shape in place of traced ones; on "meta" they cost nothing."""

    def blank(value: Any) -> Any:
        if not isinstance(value, Tensor) or (device is None and not isinstance(value, Traced)):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device or value.device)

    if isinstance(args, dict):
        return {name: blank(value) for name, value in args.items()}
    return [blank(value) for value in args]


def _shapes(args: Any) -> Any:
    return _blank(args, "meta")


def _view(func: Any, args: Any, kwargs: Any) -> Traced:
    seen, whole = func(*_shapes(args), **_shapes(kwargs)), args[0]
    if seen.shape != whole.shape:
        raise NotAProgram(f"the sampler looks at a part of the latent, of {_sizes(seen.shape)}")
    return Traced(whole.recorder, whole.cell, seen, device=whole.device)


def _replace(target: Any, made: Traced) -> Traced:
    """What an in-place operation leaves: others that look at the same tensor see it too."""
    if not isinstance(target, Traced):
        raise NotAProgram("the sampler writes the latent into a tensor of its own")
    if made.dtype != target.dtype:
        made = _to(made, dtype=target.dtype)
    target.cell.name, target.cell.numbers = made.cell.name, made.cell.numbers
    return target


def _refusal(name: str) -> str:
    if name in ("_local_scalar_dense", "equal", "is_nonzero", "item"):
        return "the sampler looks at the latent's numbers, and may take other steps when they are others"
    return f"the sampler uses {name} on the latent, which is not among a program's operations"


def _sizes(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"


def _constant(value: Tensor) -> Any:
    """A tensor of the sampler's own, as a program has it."""
    for dim, stride in enumerate(value.stride()):
        value = value.narrow(dim, 0, 1) if stride == 0 and value.shape[dim] else value
    first = value[(0,) * value.dim()] if value.dim() else value
    number = float(first)
    same = value.numel() == 1 or bool((value == first).all())
    if not same or not math.isfinite(number):
        raise NotAProgram("the sampler computes with a tensor of its own that is not the same number everywhere")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        # Whole numbers take the latent's dtype, as a Python number does.
        return number
    return Constant(value=number, dtype=dtype, num_dims=value.dim())


def _elementwise(function: str) -> Callable[..., Traced]:
    def rule(*operands: Any) -> Traced:
        recorder: SamplerRecorder = next(operand.recorder for operand in operands if isinstance(operand, Traced))
        return recorder.note(function, operands)

    return rule


def _scaled(value: Any, factor: Any) -> Any:
    return value if factor == 1 else value * factor


def _to(
    x: Traced, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **rest: Any
) -> Traced:
    """To another dtype; where a tensor lies is not the program's business."""
    seen = torch.ops.aten._to_copy(*_shapes([x]), dtype=dtype, **{**rest, "pin_memory": None})
    device = x.device if device is None else device
    if seen.dtype == x.dtype:
        return Traced(x.recorder, Cell(x.cell.name, x.cell.numbers), seen, device=device)
    name = str(seen.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise NotAProgram(f"the sampler makes the latent {name}")
    made = x.recorder.note(f"to_{name}", [x])
    return Traced(x.recorder, made.cell, seen, device=device)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Traced:
    if not isinstance(source, Traced) or source.shape != target.shape:
        raise NotAProgram("the sampler overwrites the latent with a tensor of its own")
    return source


def _lerp(start: Any, end: Any, weight: Any) -> Any:
    """As torch computes it, an operation at a time: a fused one rounds differently at the end of a slice."""
    share = float(weight.reshape(-1)[0] if isinstance(weight, Tensor) else weight)
    return start + weight * (end - start) if abs(share) < 0.5 else end - (end - start) * (1 - weight)


_add, _sub, _mul, _div, _clamp = map(_elementwise, ("add", "sub", "mul", "div", "clamp"))

RULES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, alpha=1: _add(a, _scaled(b, alpha)),
    "sub": lambda a, b, alpha=1: _sub(a, _scaled(b, alpha)),
    "rsub": lambda a, b, alpha=1: _sub(b, _scaled(a, alpha)),
    "mul": _mul,
    "div": _div,
    "reciprocal": lambda a: _div(1.0, a),
    "neg": _elementwise("neg"),
    "clamp": lambda x, min=None, max=None: _clamp(x, min, max),
    "lerp": _lerp,
    "addcmul": lambda a, b, c, *, value=1: a + _scaled(b * c, value),
    "addcdiv": lambda a, b, c, *, value=1: a + _scaled(b / c, value),
    "_to_copy": _to,
    "clone": lambda x, **rest: _to(x, **rest),
    "copy": _copy,
}
"""Operation → what is recorded for it; with a "_" behind it, it is done in place."""

FACTORIES = frozenset(
    ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
     "new_empty", "new_zeros", "new_ones", "new_full")
)  # fmt: skip
"""They take a tensor's shape, not its numbers."""

VIEWS = frozenset(("alias", "detach", "view", "_unsafe_view", "expand", "slice", "unsqueeze", "squeeze", "select"))


class Stacked:
    """What `torch.stack` makes of traced tensors; good for nothing but a weighted sum of them."""

    def __init__(self, tensors: Sequence[Tensor], dim: int = 0) -> None:
        self.tensors, self.dim = list(tensors), dim

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensordot:
            stack, weights = args[:2]
            dims = kwargs.get("dims", args[2] if len(args) > 2 else None)
            if isinstance(stack, Stacked) and isinstance(weights, Tensor) and dims == ([stack.dim], [0]):
                return stack._sum(weights)
        if func is torch.einsum and len(args) == 3:
            terms = dict(zip(args[0].replace(" ", "").split("->")[0].split(","), args[1:], strict=True))
            if terms.keys() == {"k", "bkchw"} and isinstance(terms["bkchw"], Stacked):
                return terms["bkchw"]._sum(terms["k"])
        raise NotAProgram(f"the sampler uses {getattr(func, '__name__', func)} on stacked tensors")

    def __getattr__(self, name: str) -> Any:
        raise NotAProgram(f"the sampler uses {name} on stacked tensors")

    def _sum(self, weights: Tensor) -> Tensor:
        total = self.tensors[0] * weights[0]
        for tensor, weight in zip(self.tensors[1:], weights[1:], strict=True):
            total = total + tensor * weight
        return total
