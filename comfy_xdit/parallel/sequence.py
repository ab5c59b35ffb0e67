"""Cutting a dim into shards and joining shards again, for lengths that the degree need not divide.

Every rank works out every other rank's length from the whole length, so lengths are never communicated.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from .context import Axis

Runs = tuple[tuple[int, int], ...]
"""Runs of tokens, in order: (first, number)."""


def shard_sizes(length: int, degree: int) -> list[int]:
    """Lengths of the shards of `length`: as `torch.tensor_split`, the first ones are one longer; may be 0."""
    base, longer = divmod(length, degree)
    return [base + (index < longer) for index in range(degree)]


def shard_starts(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def shards_of_runs(runs: Runs, degree: int) -> list[list[tuple[int, int]]]:
    """For each rank the parts that it holds of runs of tokens which are cut as one length; one part at least."""
    sizes = shard_sizes(sum(number for _, number in runs), degree)
    found = []
    for begin, size in zip(shard_starts(sizes), sizes, strict=True):
        parts, passed = [], 0
        for first, number in runs:
            low, high = max(begin, passed), min(begin + size, passed + number)
            if low < high:
                parts.append((first + low - passed, high - low))
            passed += number
        found.append(parts or [(runs[0][0] if runs else 0, 0)])
    return found


def cut(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's shard of `x` along `dim`; `x` itself on an axis of one rank. No communication."""
    if axis.degree == 1:
        return x
    sizes = shard_sizes(x.shape[dim], axis.degree)
    return x.narrow(dim, shard_starts(sizes)[axis.index], sizes[axis.index]).contiguous()


def join(x: Tensor, dim: int, length: int, axis: Axis) -> Tensor:
    """The whole of which `x` is this rank's shard along `dim`; `length` is the whole's.

    Collective: every rank on `axis` must call, also with an empty shard.
    """
    if axis.degree == 1:
        return x
    sizes = shard_sizes(length, axis.degree)
    assert x.shape[dim] == sizes[axis.index], f"shard of {x.shape[dim]}, not {sizes[axis.index]} of {length}"
    # all_gather wants one size: shards differ by one element at most, so the padding costs next to nothing.
    padded = x.new_zeros((max(sizes), *x.movedim(dim, 0).shape[1:]))
    padded[: x.shape[dim]] = x.movedim(dim, 0)
    shards = padded.new_empty((axis.degree, *padded.shape))
    with axis.traffic.timed("all_gather", padded.nbytes * (axis.degree - 1), padded.device):
        dist.all_gather(list(shards.unbind(0)), padded, group=axis.group)
    return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)]).movedim(0, dim)


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' `x`, alike on every rank; x is overwritten.

    Bytes are counted as a ring sends them: every rank passes on each part of the sum but one, then each part
    of the result but one: 2 · (degree - 1) / degree of x.
    Collective: every rank on `axis` must call, with one shape.
    """
    if axis.degree == 1 or x.numel() == 0:
        return x
    x = x.contiguous()
    with axis.traffic.timed("all_reduce", 2 * (axis.degree - 1) * x.nbytes // axis.degree, x.device):
        dist.all_reduce(x, group=axis.group)
    return x


def exchange(send: Tensor, send_sizes: list[int], receive_sizes: list[int], axis: Axis) -> Tensor:
    """All-to-all of a flat buffer: `send_sizes[r]` elements for rank r, `receive_sizes[r]` from it.

    Collective: every rank on `axis` must call, also with nothing to send.
    """
    received = send.new_empty(sum(receive_sizes))
    num_bytes = (send.numel() - send_sizes[axis.index]) * send.element_size()
    with axis.traffic.timed("all_to_all", num_bytes, send.device):
        if send.device.type == "cpu" and not axis.is_local:
            _exchange_over_network(received, send, receive_sizes, send_sizes, axis)
        else:
            dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=axis.group)
    return received


def _exchange_over_network(
    received: Tensor, send: Tensor, receive_sizes: list[int], send_sizes: list[int], axis: Axis
) -> None:
    """gloo's all-to-all, that uses both directions of a link at once.

    Its own sends first. Two ranks share one connection, where the word that a rank is ready to receive then waits
    behind what it sends: over a network one direction follows the other, in twice the time. (On one machine nothing
    waits, and it is a little faster.)
    """
    coming, going = received.split(receive_sizes), send.split(send_sizes)
    coming[axis.index].copy_(going[axis.index])
    peers = [(rank, place) for place, rank in enumerate(axis.ranks) if place != axis.index]
    works = [dist.irecv(coming[place], rank, axis.group) for rank, place in peers if receive_sizes[place]]
    works += [dist.isend(going[place], rank, axis.group) for rank, place in peers if send_sizes[place]]
    for work in works:
        assert work is not None
        work.wait()
