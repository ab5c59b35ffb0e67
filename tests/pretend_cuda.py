"""Stand-ins for `torch.cuda` and `torch.distributed` on a pretended device: they write down what was asked of them.

One process plays one rank after the other, so nobody else is there: a collective of devices has no numbers, and one of
hosts answers as if all ranks had said the same. That they say the same is checked afterwards, on all ranks' records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from device_tensor import DeviceTensor
from events import Block, Follow, Launch, Meet, Message, Met, where
from pretend import Device
from torch import Tensor
from torch.nn.modules import module as modules

BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock", "JointTransformerBlock", "BasicTransformerBlock")
"""Classes of diffusers whose kernels are counted."""


class Group:
    """A process group as one rank sees it. name: as all ranks call it."""

    def __init__(self, ranks: Sequence[int], rank: int, name: str) -> None:
        self.ranks, self._rank, self.name = tuple(ranks), rank, name

    def rank(self) -> int:
        return self.ranks.index(self._rank)

    def size(self) -> int:
        return len(self.ranks)


class Work:
    """An operation under way. on_device: the stream waits for it, else the host does."""

    def __init__(self, device: Device, number: int, on_device: bool) -> None:
        self._device, self._number, self._on_device = device, number, on_device

    def wait(self, timeout: Any = None) -> bool:
        self._device.events.append(Follow(self._number) if self._on_device else Met(self._number))
        return True


class Ranks:
    """`torch.distributed` of one rank among `num_ranks`: its methods have the names of the functions they stand for."""

    def __init__(self, device: Device, num_ranks: int) -> None:
        self._device, self._rank = device, device.index
        self.world = Group(range(num_ranks), device.index, "world")
        self._num_ranks, self._num_groups, self._num_begun = num_ranks, 0, 0

    def all_gather(self, out: list[Tensor], x: Tensor, group: Any = None, async_op: bool = False) -> Work | None:
        shapes = [y.shape for y in out]
        assert shapes == [x.shape] * self.get_world_size(group), f"all_gather of {x.shape} into {shapes}"
        if not isinstance(x, DeviceTensor):
            for y in out:
                y.copy_(x)
        else:
            for y in out:
                y.numbers = x.numbers  # type: ignore[attr-defined]
        # The hosts' sizes may come from what they gathered before, and nobody else was there.
        size = x.numel() if isinstance(x, DeviceTensor) else "as gathered"
        return self._collective("all_gather", group, (size, x.dtype), [x, *out], async_op)

    def all_gather_into_tensor(self, out: Tensor, x: Tensor, group: Any = None, async_op: bool = False) -> Work | None:
        assert out.numel() == x.numel() * self.get_world_size(group) and out.dtype == x.dtype
        return self._collective("all_gather", group, (x.numel(), x.dtype), [x, out], async_op)

    def all_reduce(
        self, x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Work | None:
        if isinstance(x, DeviceTensor):
            x.numbers = None
        return self._collective("all_reduce", group, (x.numel(), x.dtype, str(op)), [x], async_op)

    def broadcast(
        self, x: Tensor, src: int | None = None, group: Any = None, async_op: bool = False, group_src: int | None = None
    ) -> Work | None:
        source = src if src is not None else (group or self.world).ranks[group_src or 0]
        if isinstance(x, DeviceTensor) and source != self._rank:
            x.numbers = None
        return self._collective("broadcast", group, (x.numel(), x.dtype, source), [x], async_op)

    def all_to_all_single(
        self,
        out: Tensor,
        x: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Work | None:
        ranks = (group or self.world).ranks
        going = input_split_sizes or [x.numel() // len(ranks)] * len(ranks)
        coming = output_split_sizes or [out.numel() // len(ranks)] * len(ranks)
        assert sum(going) == x.shape[0] and sum(coming) == out.shape[0], "all_to_all of other sizes than the tensors'"
        sent = tuple((self._rank, rank, size, str(x.dtype)) for rank, size in zip(ranks, going, strict=True))
        received = tuple((rank, self._rank, size, str(out.dtype)) for rank, size in zip(ranks, coming, strict=True))
        return self._collective("all_to_all", group, (x.dtype,), [x, out], async_op, sent + received)

    def isend(self, x: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: Any = None) -> Work:
        return self._message(self._going(x, dst, group, group_dst), x, group)

    def irecv(self, x: Tensor, src: int | None = None, group: Any = None, tag: int = 0, group_src: Any = None) -> Work:
        return self._message(self._coming(x, src, group, group_src), x, group)

    def send(self, *args: Any, **kwargs: Any) -> None:
        self.isend(*args, **kwargs).wait()

    def recv(self, *args: Any, **kwargs: Any) -> None:
        self.irecv(*args, **kwargs).wait()

    def batch_isend_irecv(self, ops: list[Any]) -> list[Work]:
        if not any(isinstance(op.tensor, DeviceTensor) for op in ops):
            # Of the hosts only all together do it so far.
            number = self._meet("batch", ops[0].group or self.world, (len(ops),), wait=False)
            return [Work(self._device, number, False)]
        messages = tuple(
            (self._going if op.op.__name__ == "isend" else self._coming)(op.tensor, op.peer, op.group, op.group_peer)
            for op in ops
        )
        number = self._launch("batch", ops[0].group, (), [op.tensor for op in ops], messages)
        return [Work(self._device, number, True)]

    def barrier(self, group: Any = None, **options: Any) -> None:
        # Of a group with both back ends it is NCCL's, and the host waits for it.
        Work(self._device, self._launch("barrier", group, (), [], ()), True).wait()
        self._device.wait("barrier")

    def new_group(self, ranks: Sequence[int] | None = None, **options: Any) -> Group:
        members = tuple(ranks if ranks is not None else self.world.ranks)
        self._num_groups += 1
        self._meet("new_group", self.world, (members, *sorted(options)), wait=True)
        return Group(members, self._rank, f"group {self._num_groups} of {'-'.join(map(str, members))}")

    def destroy_process_group(self, group: Any = None) -> None:
        group = group or self.world
        if self._rank in group.ranks:
            self._meet("destroy_process_group", group, (), wait=True)

    def all_gather_object(self, out: list[Any], value: Any, group: Any = None) -> None:
        self._meet("all_gather_object", group or self.world, (), wait=True)
        out[:] = [value] * len(out)

    def get_rank(self, group: Any = None) -> int:
        return (group or self.world).rank()

    def get_world_size(self, group: Any = None) -> int:
        return (group or self.world).size()

    def get_global_rank(self, group: Any, group_rank: int) -> int:
        return group.ranks[group_rank]

    def get_process_group_ranks(self, group: Any) -> list[int]:
        return list((group or self.world).ranks)

    def get_backend(self, group: Any = None) -> str:
        return "cpu:gloo,cuda:nccl"

    def is_initialized(self) -> bool:
        return self._num_ranks > 1

    def _going(self, x: Tensor, to: int | None, group: Any, place: int | None = None) -> Message:
        return (self._rank, self._peer(to, group, place), x.numel(), str(x.dtype))

    def _coming(self, x: Tensor, source: int | None, group: Any, place: int | None = None) -> Message:
        return (self._peer(source, group, place), self._rank, x.numel(), str(x.dtype))

    def _peer(self, rank: int | None, group: Any, place: int | None) -> int:
        return (group or self.world).ranks[place] if rank is None else rank

    def _message(self, message: Message, x: Tensor, group: Any) -> Work:
        return Work(self._device, self._launch("p2p", group, (), [x], (message,)), True)

    def _collective(
        self, kind: str, group: Any, detail: tuple[Any, ...], tensors: list[Tensor], async_op: bool, messages: Any = ()
    ) -> Work | None:
        detail = tuple(map(str, detail))
        if any(isinstance(x, DeviceTensor) for x in tensors):
            work = Work(self._device, self._launch(kind, group, detail, tensors, messages), True)
        else:
            assert all(x.is_contiguous() for x in tensors), f"{kind} of a tensor that is not contiguous, in {where()}"
            work = Work(self._device, self._meet(kind, group or self.world, detail, wait=False), False)
        if async_op:
            return work
        work.wait()
        return None

    def _launch(self, kind: str, group: Any, detail: tuple[Any, ...], tensors: list[Tensor], messages: Any) -> int:
        for x in tensors:
            if not isinstance(x, DeviceTensor) or x.device != self._device.device:
                raise AssertionError(f"{kind} of a tensor on {x.device} at rank {self._rank}, in {where()}")
            if not x.is_contiguous():
                shape = f"{tuple(x.shape)} with strides {x.stride()}"
                raise AssertionError(f"{kind} of a tensor that is not contiguous, {shape}, in {where()}")
        group = group or self.world
        assert self._rank in group.ranks, f"{kind} over {group.ranks} at rank {self._rank}, in {where()}"
        self._num_begun += 1
        self._device.events.append(Launch(self._num_begun, kind, group.name, group.ranks, detail, messages, where()))
        return self._num_begun

    def _meet(self, kind: str, group: Group, detail: tuple[Any, ...], *, wait: bool) -> int:
        self._num_begun += 1
        self._device.events.append(Meet(self._num_begun, kind, group.name, group.ranks, detail, where()))
        if wait:
            self._device.events.append(Met(self._num_begun))
        return self._num_begun


class Card:
    """`torch.cuda` of one rank's card: methods have the names of the functions they stand for."""

    def __init__(self, device: Device, num_cards: int) -> None:
        self._device, self._num_cards = device, num_cards

        class Event:
            """A mark on the stream; the host that asks whether it was passed doesn't wait."""

            def __init__(self, *args: Any, **options: Any) -> None: ...
            def record(self, stream: Any = None) -> None: ...
            def wait(self, stream: Any = None) -> None: ...
            def query(self) -> bool:
                return True

            def elapsed_time(self, other: Any) -> float:
                return 1.0

            def synchronize(self) -> None:
                device.wait("Event.synchronize")

        self.Event = Event

    def _lazy_init(self) -> None: ...
    def set_device(self, device: Any) -> None: ...
    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return self._num_cards

    def current_device(self) -> int:
        return self._device.index

    def synchronize(self, device: Any = None) -> None:
        self._device.wait("cuda.synchronize", for_all=True)

    def empty_cache(self) -> None:
        self._device.wait("cudaFree", for_all=True)

    def current_stream(self, device: Any = None) -> Any:
        return SimpleNamespace(synchronize=lambda: self._device.wait("Stream.synchronize"))

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self._device.capability

    def get_device_name(self, device: Any = None) -> str:
        return "a card that isn't there"

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 20 << 30, 24 << 30

    def memory_reserved(self, device: Any = None) -> int:
        return 4 << 30

    def max_memory_allocated(self, device: Any = None) -> int:
        return 4 << 30


@contextlib.contextmanager
def pretending(rank: int, num_ranks: int, capability: tuple[int, int] = (8, 9), number: int = 4) -> Iterator[Device]:
    """This process is a rank with a card of its own, among others, inside the `with`. number: as `Device` has it."""
    device = Device(rank, capability, number)
    with contextlib.ExitStack() as stack:
        for place, stand_in in ((dist, Ranks(device, num_ranks)), (torch.cuda, Card(device, num_ranks))):
            for name in dir(stand_in):
                if hasattr(place, name) and not name.startswith("__"):
                    stack.enter_context(mock.patch.object(place, name, getattr(stand_in, name)))
            if isinstance(stand_in, Ranks):
                world = dist.distributed_c10d._world
                stack.callback(setattr, world, "default_pg", world.default_pg)
                world.default_pg = stand_in.world if num_ranks > 1 else None
                stack.enter_context(mock.patch.object(dist, "P2POp", _plan))
        for hook in _block_hooks(device):
            stack.callback(hook.remove)
        yield stack.enter_context(device.on())


def _plan(op: Any, tensor: Tensor, peer: Any = None, group: Any = None, tag: int = 0, group_peer: Any = None) -> Any:
    return SimpleNamespace(op=op, tensor=tensor, peer=peer, group=group, group_peer=group_peer)


def _block_hooks(device: Device) -> list[Any]:
    def begin(module: Any, args: Any) -> None:
        if type(module).__name__ in BLOCKS:
            device.events.append(Block(type(module).__name__))

    def end(module: Any, args: Any, out: Any) -> None:
        if type(module).__name__ in BLOCKS:
            device.events.append(Block(""))

    return [
        modules.register_module_forward_pre_hook(begin),
        modules.register_module_forward_hook(end, always_call=True),
    ]
