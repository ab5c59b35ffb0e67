"""A first exchange between all ranks, of numbers known beforehand, before a job needs one.

Two devices that can't reach each other make NCCL hang, raise or, behind a bridge that redirects transfers, deliver
other numbers than were sent. Here that costs a start and is told with the pair of ranks; in a job it would cost the
job, or a picture. NCCL keeps a connection between two ranks that exchanged anything, and memory of their devices for
it, as long as the group lives. Few of them a job will use: so the exchange has a group of its own, which is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.pool.trial import ALL_REDUCE, ALL_TO_ALL, SEND_RECEIVE
from comfy_xdit.quoted import quoted

NUM_FLOATS = {"cuda": 1 << 20, "cpu": 1 << 10}
"""To one rank: on a GPU enough to go by every way that NCCL has for large messages."""

Tell = Callable[..., None]


def try_groups(device: torch.device, rank: int, num_ranks: int, tell: Tell) -> None:
    """Exchange numbers with every other rank, on the device and on the host. Collective over all ranks.

    tell: `CoordinatorClient.say`; the coordinator hears of every exchange before it begins ("trying"), and what is
    wrong with one ("trial_failed"). It judges: a rank that hangs in one can't. Raises RuntimeError when one failed;
    then this process has to end, since its peers wait for it.
    """
    if num_ranks > 1:
        groups = GroupCache(num_ranks)
        group = groups.make_for_all()
        _try(group, device, rank, num_ranks, tell)
        groups.close()
    tell("tried")


def _try(group: dist.ProcessGroup, device: torch.device, rank: int, num_ranks: int, tell: Tell) -> None:
    places = [torch.device("cpu"), device] if device.type != "cpu" else [device]
    number = 0
    for place in places:
        for step, peers, exchange in _steps(place, rank, num_ranks, group):
            number += 1
            about = {"number": number, "step": step, "backend": "gloo" if place.type == "cpu" else "NCCL"}
            tell("trying", **about, peers=peers)
            try:
                wrong = exchange()
            except Exception as error:
                _fail(tell, about, peers, f"{type(error).__name__}: {quoted(error)}")
            if wrong is not None:
                _fail(tell, about, wrong, "")


def _fail(tell: Tell, about: dict[str, Any], peers: list[int], raised: str) -> None:
    tell("trial_failed", **about, peers=peers, raised=raised[:400])
    raise RuntimeError(f"{about['step']} over {about['backend']} failed")


def _steps(
    place: torch.device, rank: int, num_ranks: int, group: dist.ProcessGroup | None
) -> Iterator[tuple[str, list[int], Callable[[], list[int] | None]]]:
    """(what, with whom, how) of each exchange. `how` gives the ranks whose numbers came wrong; None when all are right.

    All ranks take part in each, since NCCL makes its connections at the first.
    """
    for shift in range(1, num_ranks):
        after, before = (rank + shift) % num_ranks, (rank - shift) % num_ranks

        def send_receive(after: int = after, before: int = before) -> list[int] | None:
            return _send_receive(place, rank, after, before, group)

        yield SEND_RECEIVE, [before, after], send_receive
    yield ALL_REDUCE, [], lambda: _all_reduce(place, rank, num_ranks, group)
    yield ALL_TO_ALL, [], lambda: _all_to_all(place, rank, num_ranks, group)


def _numbers(place: torch.device, source: int, target: int) -> Tensor:
    """What `source` sends to `target`: whole numbers that no other two ranks exchange, exact in any order of sums."""
    pattern = torch.arange(NUM_FLOATS[place.type], device=place) % 251
    return (pattern + 1009 * source + 17 * target).float()


def _send_receive(
    place: torch.device, rank: int, after: int, before: int, group: dist.ProcessGroup | None
) -> list[int] | None:
    sent, received = _numbers(place, rank, after), torch.full((NUM_FLOATS[place.type],), -1.0, device=place)
    both = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, received, before, group)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    return None if torch.equal(received, _numbers(place, before, rank)) else [before]


def _all_reduce(
    place: torch.device, rank: int, num_ranks: int, group: dist.ProcessGroup | None
) -> list[int] | None:
    total = _numbers(place, rank, 0)
    dist.all_reduce(total, group=group)
    wanted = torch.stack([_numbers(place, source, 0)[:251] for source in range(num_ranks)]).sum(0)
    repeats = -(-total.numel() // 251)
    return None if torch.equal(total, wanted.repeat(repeats)[: total.numel()]) else []


def _all_to_all(
    place: torch.device, rank: int, num_ranks: int, group: dist.ProcessGroup | None
) -> list[int] | None:
    sent = torch.cat([_numbers(place, rank, target) for target in range(num_ranks)])
    received = torch.full_like(sent, -1.0)
    dist.all_to_all_single(received, sent, group=group)
    parts = received.chunk(num_ranks)
    return [source for source, part in enumerate(parts) if not torch.equal(part, _numbers(place, source, rank))] or None
