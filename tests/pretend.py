"""Tensors of a GPU that isn't there: shape, strides, dtype and device are as CUDA would have them, without numbers.

A `Device` is a dispatch mode. While it is on, what is made on its CUDA device is a `DeviceTensor`, whose operations run
torch's own shape functions; tensors on the CPU stay real. It refuses what CUDA refuses (two devices, two dtypes in a
product, arithmetic in fp8, a kernel that the card hasn't got), and writes down in order what the host gives the card to
do, and where the host waits for it (`events.py`).
No compiler and no build of torch for CUDA is needed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from device_tensor import Calls, DeviceTensor
from events import Event, Kernel, Wait, where
from shapes import is_view, leaves, mapped, name_of, shaped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MOVES = ("_to_copy", "copy_", "clone", "cat", "fill_", "zero_", "empty_like", "new_empty", "detach")
"""All that CUDA does with fp8 numbers as such, beside views."""

ONE_DTYPE = (
    *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_convolution"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "scaled_dot_product_attention"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
)
"""Kernels that read all their tensors as numbers of one type. torch's shape functions don't mind; CUDA does."""

NUMBERS = ("zeros", "ones", "full", "arange")
FEW = 64
"""Numbers are followed in tensors of so many, made by the host or by `NUMBERS`."""

BY_SIZE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention")
"""Operations of libraries that have many kernels, and choose among them by the sizes."""

NO_KERNEL = (
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("detach", "lift_fresh", "_unsafe_view"),
)
"""Beside views."""

WAITS = ("masked_select", "equal", "is_nonzero", "_unique", "_unique2", "unique_dim", "bincount")
"""Operations whose result's shape, or answer, the host has to fetch from the device."""


class Device(TorchDispatchMode):
    """One rank's card. capability: as CUDA numbers it. events: what happened, in order.

    number: what the host reads where it looks at a number of the device that nobody knows.
    """

    def __init__(self, rank: int, capability: tuple[int, int] = (8, 9), number: int = 4) -> None:
        super().__init__()
        self.index, self.capability, self.number = rank, capability, number
        self.device = torch.device("cuda", rank)
        self.events: list[Event] = []
        self._free_pinned: Counter[int] = Counter()
        self._calls = Calls(self.device)
        self._known: set[tuple[Any, ...]] = set()

    @contextlib.contextmanager
    def on(self) -> Iterator[Device]:
        """The card is there inside the `with`."""
        with self._calls, self:
            yield self

    def wait(self, what: str, *, for_all: bool = False) -> None:
        """The host waits for its stream; for_all: for everything on the device."""
        self.events.append(Wait(what, for_all, where()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            return self._pinned(func, args, kwargs)
        flat = leaves((args, kwargs))
        here = [x for x in flat if isinstance(x, DeviceTensor)]
        wanted = next((x for x in flat if isinstance(x, torch.device)), None)
        if not here and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        name = name_of(func)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if func not in WHOLE:
            with self:  # In inference mode operations made of others come whole.
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
            WHOLE.add(func)
        self._check_devices(name, flat, here, wanted)
        special = getattr(self, f"_do_{name}", None)
        if special is not None:
            done = special(*args, **kwargs)
            if done is not NotImplemented:
                return done
        if name in WAITS:
            self.wait(name)
        self._check_dtypes(name, func, here)
        return self._run(func, name, args, kwargs)

    def _check_devices(self, name: str, flat: list[Any], here: list[DeviceTensor], wanted: torch.device | None) -> None:
        places = {x.device for x in here} | ({wanted} if wanted is not None and wanted.type == "cuda" else set())
        places = {self.device if place.index is None else place for place in places}
        if places - {self.device}:
            raise AssertionError(f"{name} on {sorted(map(str, places))} at rank {self.index}, in {where()}")
        if name in ("copy_", "_to_copy", "index"):
            return
        for x in flat:
            if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) and here and x.dim():
                shape = tuple(x.shape)
                raise AssertionError(f"{name} of a tensor of the CPU, {shape}, and one on {self.device}, in {where()}")

    def _check_dtypes(self, name: str, func: Any, here: list[DeviceTensor]) -> None:
        dtypes = {x.dtype for x in here}
        floats = {dtype for dtype in dtypes if dtype.is_floating_point}
        if name in ONE_DTYPE and len(floats) > 1:
            raise AssertionError(f"{name} of {sorted(map(str, floats))}, in {where()}")
        if dtypes & set(FP8) and name not in MOVES and not is_view(func):
            raise AssertionError(f"{name} of fp8 numbers, in {where()}")
        if name == "_scaled_dot_product_flash_attention" and (self.capability < (8, 0) or floats - HALVES):
            raise AssertionError(f"{name} of {floats} on a card of {self.capability}, in {where()}")
        if name == "_scaled_dot_product_efficient_attention" and not self._is_efficient(next(iter(floats))):
            raise AssertionError(f"{name} of {floats} on a card of {self.capability}, in {where()}")

    def _is_efficient(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and self.capability >= (8, 0))

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The operation's shapes, and its kernel in the list."""
        wrappers = {id(x.meta): x for x in leaves((args, kwargs)) if isinstance(x, DeviceTensor)}
        made = shaped(func, args, kwargs)

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            known = wrappers.get(id(x))
            if known is None:
                return DeviceTensor(x, self.device)
            assert known.shape == x.shape, f"{name} changes a tensor's shape in place, in {where()}"
            return known

        if not is_view(func) and name not in NO_KERNEL:
            outputs = [x for x in leaves(made) if isinstance(x, Tensor)]
            if any(x.numel() for x in outputs):
                self.kernel(name, outputs[0].dtype, tuple(x.shape for x in wrappers.values()))
        wrapped = mapped(wrap, made)
        self._compute(func, (args, kwargs), wrapped, {id(x) for x in wrappers.values()})
        return wrapped

    def _compute(self, func: Any, given: Any, wrapped: Any, old: set[int]) -> None:
        """The numbers too, where all are known: a count of rows that goes from one host to the others by NCCL."""
        outputs = [x for x in leaves(wrapped) if isinstance(x, DeviceTensor)]
        if any(id(x) in old for x in outputs):
            for x in outputs:
                x.numbers = None
            return
        tensors = [x for x in leaves(given) if isinstance(x, Tensor)]
        if (not tensors and name_of(func) not in NUMBERS) or any(x.numel() > FEW for x in outputs):
            return
        if any(getattr(x, "numbers", x) is None or x.numel() > FEW for x in tensors):
            return
        args, kwargs = mapped(_number_of, given)
        for x, numbers in zip(outputs, leaves(func(*args, **kwargs)), strict=True):
            x.numbers = numbers

    def kernel(self, name: str, dtype: torch.dtype | None, sizes: tuple[torch.Size, ...] = ()) -> None:
        """A kernel is launched; CUDA may have to load it first."""
        key, sized = (name, dtype), (name, dtype, sizes)
        self.events.append(Kernel(name, key not in self._known, name in BY_SIZE and sized not in self._known))
        self._known |= {key, sized}

    # What is more than its shapes: copies between host and device, looks at numbers, attention.

    def _do__local_scalar_dense(self, x: Tensor) -> bool | int | float:
        self.wait("item")
        if x.numbers is not None:
            return x.numbers.item()
        kind: Callable[[int], Any] = bool if x.dtype == torch.bool else float if x.dtype.is_floating_point else int
        return kind(self.number)

    def _do_nonzero(self, x: Tensor) -> Tensor:
        self.wait("nonzero")
        return DeviceTensor(torch.empty((self.number, x.dim()), dtype=torch.int64, device="meta"), self.device)

    def _do__to_copy(self, x: Tensor, **options: Any) -> Any:
        wanted = options.get("device")
        if wanted is None:
            return NotImplemented
        from_here, to_here = isinstance(x, DeviceTensor), torch.device(wanted).type == "cuda"
        if from_here and not to_here:
            self.wait("copy to the host")
            dtype = options.get("dtype") or x.dtype
            return torch.zeros(x.shape, dtype=dtype) if x.numbers is None else x.numbers.to(dtype, copy=True)
        if to_here and not from_here and not options.get("non_blocking"):
            self.wait("copy from the host")
        return NotImplemented

    def _do_copy_(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
        from_here, to_here = isinstance(source, DeviceTensor), isinstance(target, DeviceTensor)
        if from_here and not to_here:
            if non_blocking and getattr(target, "is_pretended_pinned", False):
                self.kernel("copy to the host", source.dtype)
            else:
                self.wait("copy to the host")
            return target
        if to_here and not from_here and not non_blocking:
            self.wait("copy from the host")
        return NotImplemented

    def _do_index(self, x: Tensor, places: Sequence[Tensor | None]) -> Any:
        named = [place for place in places if place is not None]
        if any(place.dtype in (torch.bool, torch.uint8) for place in named):
            self.wait("index by a mask")
        if any(not isinstance(place, DeviceTensor) for place in named):
            self.wait("copy from the host")
        return NotImplemented

    def _do_repeat_interleave(self, repeats: Tensor, *args: Any, output_size: int | None = None) -> Any:
        if output_size is None:
            self.wait("repeat_interleave")
        return NotImplemented

    def _pinned(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """torch keeps pinned memory for the next who wants as much; CUDA is asked where none of it is free."""
        made = func(*args, **{**kwargs, "pin_memory": False})
        if self._free_pinned[made.nbytes]:
            self._free_pinned[made.nbytes] -= 1
        else:
            self.wait("pinned memory", for_all=True)
        weakref.finalize(made, self._free_pinned.update, [made.nbytes])
        made.is_pretended_pinned = True
        return made

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """By the kernel that torch would choose; what it puts out lies in memory as that kernel leaves it."""
        half = q.dtype in HALVES and q.shape[-1] <= 256
        with self:
            if half and mask is None and self.capability >= (8, 0) and q.shape[-1] % 8 == 0:
                return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
            if self._is_efficient(q.dtype) and q.shape[-1] % 8 == 0:
                bias = mask
                if mask is not None:
                    if mask.dtype == torch.bool:
                        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask.logical_not(), -torch.inf)
                    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
                return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=scale)[0]
            return aten._scaled_dot_product_attention_math(q, k, v, mask, scale=scale)[0]


HALVES = {torch.float16, torch.bfloat16}


WHOLE: set[Any] = set()
"""Operations that are made of no others."""


def _number_of(x: Any) -> Any:
    return torch.device("cpu") if isinstance(x, torch.device) else getattr(x, "numbers", x)
