"""DistriFusion: attention to fresh keys of one's own and to the other ranks' keys of the evaluation before.

From one step of sampling to the next activations change little. So a rank need not wait for the others'
keys and values: it uses those that they sent during the previous evaluation, and sends its fresh ones, which
have a whole evaluation's time to arrive. The first evaluations are exact, and fill the buffers.
Source: DistriFusion, arXiv 2402.19481.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from .context import Axis


class DistriKeys:
    """Keys and values of all ranks on the distri axis, fresh or, but for the own ones, one evaluation old.

    evaluations: one entry for each evaluation of the model to come, equal where the same rows meet the same
    conditioning; call `begin` before each. The first `warmup_steps` of them are exact, also the first of its
    kind, and all when not `stale`. Without `evaluations` there is nothing to remember, and all is exact.
    Buffers live until `close`, which the end of a `with` calls; most_bytes_held: the most that they took
    between evaluations. Every rank on the axis makes the same calls.
    """

    def __init__(
        self,
        axis: Axis,
        evaluations: Sequence[Hashable] = (),
        *,
        warmup_steps: int = 1,
        stale: bool = True,
    ) -> None:
        self._axis = axis
        self._evaluations = list(evaluations)
        self._num_exact = warmup_steps if stale else len(self._evaluations)
        self._old = False
        self._keep = False
        self._kind: Hashable = None
        self._uses: Counter[str] = Counter()
        self._gathers: dict[Hashable, _Gather] = {}
        self.most_bytes_held = 0

    def begin(self, number: int) -> None:
        """Evaluation `number` is next."""
        self._kind = self._evaluations[number]
        self._old = number >= self._num_exact
        later = range(number + 1, len(self._evaluations))
        following = next((other for other in later if self._evaluations[other] == self._kind), None)
        # Of use at the next evaluation of the kind only, and there only where it isn't exact.
        self._keep = following is not None and following >= self._num_exact
        self._uses.clear()
        self.most_bytes_held = max(self.most_bytes_held, self.bytes_held)

    def __call__(self, k: Tensor, v: Tensor, path: str, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """k and v of the axis' ranks, one after the other along dim 2; `k` and `v` are this rank's.

        k, v: [batch, heads, tokens, head dim]; lengths: the ranks' numbers of tokens; path: of the layer.
        """
        if self._axis.degree == 1:
            return k, v
        # An evaluation may be several forwards, one for each call that could not be batched.
        key = (self._kind, path, self._uses[path])
        self._uses[path] += 1
        gather = self._gathers.get(key) if self._old else None
        if gather is None:
            assert key not in self._gathers, f"{path}: old keys that are of no use were kept"
            gather = _Gather.like(k, v, lengths, self._axis)
            gather.now(k, v)
            whole = gather.whole()
        else:
            whole = gather.whole(k, v)
            if self._keep:
                gather.start(k, v)
        if self._keep:
            self._gathers[key] = gather
        else:
            self._gathers.pop(key, None)
        return whole

    @property
    def bytes_held(self) -> int:
        """What buffers take now: for each layer the keys and values of the whole axis, and this rank's again."""
        return sum(gather.sent.nbytes + gather.received.nbytes for gather in self._gathers.values())

    def close(self) -> None:
        """Wait for what is under way, and let go of it."""
        for gather in self._gathers.values():
            gather.wait()
        self._gathers.clear()

    def __enter__(self) -> DistriKeys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        # After an error ranks don't stand at the same place: one may wait for ever for another.
        self._gathers.clear()


@dataclasses.dataclass(kw_only=True)
class _Gather:
    """One layer's keys and values on their way to every rank, or there.

    sent: [the longest rank's numbers]; received: [rank, the same]. Each rank's numbers are its keys, then
    its values, then padding.
    """

    axis: Axis
    lengths: tuple[int, ...]
    shapes: tuple[torch.Size, torch.Size]
    sent: Tensor
    received: Tensor
    work: dist.Work | None = None

    @classmethod
    def like(cls, k: Tensor, v: Tensor, lengths: Sequence[int], axis: Axis) -> _Gather:
        """Buffers for tensors like `k` and `v`, in one piece."""
        per_token = sum(x.shape[0] * x.shape[1] * x.shape[3] for x in (k, v))
        # all_gather wants one size; shards of a stream differ by one token at most.
        sent = k.new_zeros(max(lengths) * per_token)
        received = sent.new_empty((axis.degree, sent.numel()))
        return cls(axis=axis, lengths=tuple(lengths), shapes=(k.shape, v.shape), sent=sent, received=received)

    @property
    def num_bytes(self) -> int:
        """What this rank sends."""
        return self.sent.nbytes * (self.axis.degree - 1)

    def now(self, k: Tensor, v: Tensor) -> None:
        """Send this rank's, receive everyone's, and wait for them."""
        with self.axis.traffic.timed("all_gather", self.num_bytes, k.device):
            self._send(k, v)
            self.wait()

    def start(self, k: Tensor, v: Tensor) -> None:
        """As `now`, but go on meanwhile; what was received before is overwritten."""
        self.axis.traffic.bytes["all_gather"] += self.num_bytes
        self._send(k, v)

    def wait(self) -> None:
        """Until all that was sent is here."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def _send(self, k: Tensor, v: Tensor) -> None:
        assert self.work is None and (k.shape, v.shape) == self.shapes
        for part, x in zip(self._parts(self.sent, self.axis.index), (k, v), strict=True):
            part.copy_(x)
        self.work = dist.all_gather_into_tensor(self.received.view(-1), self.sent, group=self.axis.group, async_op=True)

    def whole(self, *fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of all that was received, in the order of the ranks, `fresh` in the place of this rank's."""
        if self.work is not None:
            with self.axis.traffic.timed("all_gather", 0, self.sent.device):
                self.wait()
        parts = [self._parts(row, rank) for rank, row in enumerate(self.received)]
        if fresh:
            parts[self.axis.index] = list(fresh)
        k, v = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
        return k, v

    def _parts(self, flat: Tensor, rank: int) -> list[Tensor]:
        shapes = [(shape[0], shape[1], self.lengths[rank], shape[3]) for shape in self.shapes]
        sizes = [math.prod(shape) for shape in shapes]
        return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]
