"""What is asked of the records of a run on pretended devices."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from events import Block, Kernel, Launch, Wait
from nccl_sim import Record, brief, launches, stuck
from rehearsal import Played

NUM_WAITS = 60
"""How many random launches wait for the whole device, one in each replay."""


def kernels_per_block(records: Sequence[Record]) -> dict[str, int]:
    """Class of block → the most kernels that one of them launched, on any rank."""
    most: dict[str, int] = defaultdict(int)
    for record in records:
        inside, number = "", 0
        for event in record:
            if isinstance(event, Block):
                if inside:
                    most[inside] = max(most[inside], number)
                inside, number = event.name, 0
            elif isinstance(event, Kernel):
                number += 1
    return dict(most)


def loop_waits(record: Record) -> Counter[str]:
    """Where the host waited for its device, from the first block of the transformer to the last."""
    blocks = [number for number, event in enumerate(record) if isinstance(event, Block)]
    inside = record[blocks[0] : blocks[-1]]
    return Counter(f"{event.what} in {event.where}" for event in inside if isinstance(event, Wait))


def hangs(played: Sequence[Played]) -> list[str]:
    """A sentence for each way in which the ranks would wait for each other for ever; [] is good."""
    records = [brief([*one.loaded, *one.ran]) for one in played]
    found = []
    for name, options in (("", {}), ("lazy loading", {"lazy_loading": True}), ("groups that share", {"eager": True})):
        where = stuck(records, **options)
        if where:
            found.append(f"{name or 'as it is'}: {where}")
    # The groups' making is over: what is looked for is a wait in mid-job.
    begun = [len(brief(one.loaded)) for one in played]
    places = [(rank, index) for rank, index in launches(records) if index >= begun[rank]]
    for rank in range(len(records)):
        # As bad as any number of its waits: one more only holds up.
        where = stuck(records, held=[place for place in places if place[0] == rank])
        if where:
            found.append(f"rank {rank} waits for its device at each launch: {where}")
    for place in random.Random(0).sample(places, min(NUM_WAITS, len(places))):
        where = stuck(records, held=[place])
        if where:
            found.append(f"rank {place[0]} waits once for its device, at {records[place[0]][place[1]]}: {where}")
    return found


def num_streams(record: Record) -> int:
    """Streams that the rank's device has work in: the compute stream, and one for each communicator."""
    calls = [event for event in record if isinstance(event, Launch)]
    pairs = {(event.group, frozenset(event.messages[0][:2])) for event in calls if event.kind == "p2p"}
    return 1 + len(pairs) + len({event.group for event in calls if event.kind != "p2p"})
