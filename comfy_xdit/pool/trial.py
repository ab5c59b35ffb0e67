"""What the first exchange between the ranks came to, in a sentence that names who can't reach whom, and the cure.

The workers run it (`worker/trial.py`) and tell each step beforehand; the coordinator judges, by time where one hangs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .fields import Malformed, integer, one_of

LIMIT_S = 60.0
"""For all steps, from when all ranks have their process groups."""

SEND_RECEIVE, ALL_REDUCE, ALL_TO_ALL = "send and receive", "all_reduce", "all_to_all"

CAUSES = {
    "NCCL": "usual causes: GPUs that can't reach each other's memory (`comfy-xdit pool stop`, set NCCL_P2P_DISABLE=1 "
    "for what starts the pool, start again), too little shared memory (in Docker --shm-size=1g), or an IOMMU or PCIe "
    "ACS that redirects transfers (switch it off in the BIOS)",
    "gloo": "usual causes: a firewall between the machines, or too little memory",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """An exchange that a rank tries. number: counts from 1. peers: the rank that it receives from, and the one that it
    sends to; none for a collective of all.
    """

    number: int
    step: str
    backend: str
    peers: tuple[int, ...]


def step_of(message: Mapping[str, Any], num_ranks: int) -> Step:
    """The step that a worker tells of. Raises Malformed."""
    peers = message.get("peers")
    if type(peers) is not list or len(peers) > num_ranks:
        raise Malformed("'peers' is no list of ranks")
    return Step(
        number=integer(message, "number", low=1),
        step=one_of(message, "step", (SEND_RECEIVE, ALL_REDUCE, ALL_TO_ALL)),
        backend=one_of(message, "backend", tuple(CAUSES)),
        peers=tuple(integer({"peers": peer}, "peers", high=num_ranks - 1) for peer in peers),
    )


def failed(step: Step, rank: int, raised: str, devices: Sequence[str]) -> str:
    """What to tell of a step that raised on `rank`, or (`raised` is "") gave wrong numbers there."""
    what = f"raised {raised}" if raised else "gave wrong numbers"
    return _sentence(step, [*step.peers[:1], rank], what, devices)


def overdue(steps: Mapping[int, Step | None], devices: Sequence[str]) -> str:
    """What to tell when the ranks in `steps` have not ended in time. Step: the last that each tried; None for none."""
    absent = [rank for rank, step in steps.items() if step is None]
    if absent:
        known = next((step for step in steps.values() if step is not None), None)
        causes = f"; {CAUSES[known.backend]}" if known else ""
        return f"{_named(absent, devices)} did not begin to exchange data within {LIMIT_S:.0f} s{causes}"
    at = {rank: step for rank, step in steps.items() if step is not None}
    first = min(step.number for step in at.values())
    # Those that are ahead wait for one of these.
    behind = {rank: step for rank, step in at.items() if step.number == first}
    rank, step = next(iter(behind.items()))
    pairs = [(own.peers[0], r) for r, own in behind.items() if own.peers and own.peers[0] in behind]
    if pairs:
        ranks = list(pairs[0])
    elif step.peers:
        ranks = [step.peers[0], rank]
    else:
        ranks = list(behind)
    return _sentence(step, ranks, f"did not end within {LIMIT_S:.0f} s", devices)


def _sentence(step: Step, ranks: Sequence[int], what: str, devices: Sequence[str]) -> str:
    who = _named(ranks, devices)
    causes = CAUSES[step.backend]
    return f"{who} can't exchange data over {step.backend}: {step.step} {what}; {causes}; see docs/troubleshooting.md"


def _named(ranks: Sequence[int], devices: Sequence[str]) -> str:
    names = [f"worker {rank} ({devices[rank]})" for rank in dict.fromkeys(ranks)]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
