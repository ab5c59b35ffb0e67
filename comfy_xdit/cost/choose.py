"""Every spec of a number of devices with its predicted step time, bytes and memory, the best first."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from comfy_xdit.parallel.patch_rows import usual_patches
from comfy_xdit.parallel.spec import APPROXIMATE, BALANCES, MAX_CFG, ParallelSpec, check, products

from .arithmetic import Network, attention_flops
from .formulas import distri, joined, ring, sent, shared, tensor, ulysses
from .job import sent_in_job
from .links import Device, Links
from .memory import Memory, memory
from .work import RankShare, Work, part_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a spec costs, on its busiest rank.

    step_s: one evaluation, on average over the job; compute_s: of which matrices; waiting_s: of which links, as far as
    they aren't hidden behind compute, and with pipe its warming up and filling. sent_bytes: in one evaluation.
    fits: it leaves free what a device reserves.
    """

    spec: ParallelSpec
    step_s: float
    compute_s: float
    waiting_s: float
    sent_bytes: int
    memory: Memory
    fits: bool

    num_idle: int = 0
    """Ranks without a row to run."""

    balance: str = BALANCES[0]
    """What the stages of a pipeline have alike."""

    @property
    def exact(self) -> bool:
        return all(getattr(self.spec, axis) == 1 for axis in APPROXIMATE)


def predictions(
    network: Network, work: Work, num_ranks: int, link: Links, device: Device, *, approximate: bool = True
) -> list[Prediction]:
    """All specs that the engine runs on so many ranks: what fits before what doesn't, then by time.

    Equal times: less memory first, then less to send. A pipeline whose stages fit only when they share out weights,
    not time, does that.
    """
    found = [_fitting(network, work, spec, link, device) for spec in specs(network, work, num_ranks)]
    kept = [prediction for prediction in found if prediction.exact or approximate]
    return sorted(kept, key=lambda p: (not p.fits, round(p.step_s, 6), p.memory.total, p.sent_bytes, str(p.spec)))


def specs(network: Network, work: Work, num_ranks: int) -> Iterator[ParallelSpec]:
    """Every product of degrees that makes `num_ranks`, and suits the model and the size of the work.

    Also those that leave some ranks without rows: over a slow link nothing may be faster.
    """
    tokens = work.tokens(network)
    least = min(tokens[stream] for stream in network.cut)
    for spec in products(num_ranks, {"cfg": min(MAX_CFG, work.chunks)}):
        # It could run, but a shorter stream is cut by nobody (`TokenShards.short`), and its price is not known.
        too_small = spec.pipe > 1 and spec.ring * spec.ulysses > least
        if not too_small and not check(spec, num_ranks=num_ranks, shape=network.shape):
            yield spec


def ranking(
    network: Network, work: Work, link: Links, device: Device
) -> Callable[[ParallelSpec], tuple[int, int, int, int, int]]:
    """What `spec.auto` goes by: what fits memory, then no rank without rows, then weights that need not be
    spread, then time, then memory. Where nothing fits, memory comes first: the least may still run.

    A rank without rows is what the pool's user did not ask for, though it may be faster over a slow link.
    Weights that are spread are read anew when degrees change, so that is worth it for room only. Times within
    2 % of each other are the same.
    """

    def cost(spec: ParallelSpec) -> tuple[int, int, int, int, int]:
        found = predict(network, work, spec, link, device)
        steps = round(math.log(max(found.step_s, 1e-9)) / 0.02)
        lacking = 0 if found.fits else found.memory.total
        return lacking, found.num_idle, spec.tensor, steps, found.memory.total

    return functools.cache(cost)


def _fitting(network: Network, work: Work, spec: ParallelSpec, link: Links, device: Device) -> Prediction:
    """As `predict`, with stages balanced by memory where that makes them fit."""
    prediction = predict(network, work, spec, link, device)
    if prediction.fits or spec.pipe == 1:
        return prediction
    other = predict(network, dataclasses.replace(work, balance="memory"), spec, link, device)
    return other if other.fits else prediction


def predict(network: Network, work: Work, spec: ParallelSpec, link: Links, device: Device) -> Prediction:
    """The prediction for one spec: of its slowest rank, as the others wait for it."""
    times = [_times(network, work, spec, rank, link, device) for rank in range(spec.num_ranks)]
    compute_s, waiting_s = max(times, key=sum)
    step_s = compute_s + waiting_s
    if spec.pipe > 1:
        busy = [sum(time) for time in times if time[0]]
        serial_s = spec.pipe * sum(busy) / len(busy)
        step_s = _pipelined(network, work, spec, link, step_s, serial_s)
    worst = max((memory(network, work, spec, rank) for rank in range(spec.num_ranks)), key=lambda m: m.total)
    return Prediction(
        spec=spec,
        step_s=step_s,
        compute_s=compute_s,
        waiting_s=step_s - compute_s,
        sent_bytes=max(_sent(network, work, spec, rank) for rank in range(spec.num_ranks)),
        memory=worst,
        num_idle=sum(not part_of(network, work, spec, rank).rows for rank in range(spec.num_ranks)),
        fits=worst.total <= device.room_bytes,
        balance=work.balance,
    )


def _times(
    network: Network, work: Work, spec: ParallelSpec, rank: int, link: Links, device: Device
) -> tuple[float, float]:
    """Seconds of arithmetic, and seconds for which links hold it up, in one evaluation on `rank`.

    With pipe: of its stage alone, as when the pipeline is full.
    """
    part = part_of(network, work, spec, rank)
    waiting = link.on(spec, "cfg", "dp").seconds(shared(network, work, part))
    if not part.rows:
        return 0.0, waiting
    flops = _flops(network, part)
    for block, count in network.kinds(part.blocks).items():
        for streams in network.blocks[block].attention:
            attention_s = _attention_flops(network, part, streams) / device.flops_per_s
            flops += count * _attention_flops(network, part, streams)
            waiting += count * link.on(spec, "ulysses").seconds(ulysses(network, work, part, streams), 2)
            waiting += count * _ring_waits(network, work, part, streams, link, attention_s)
        waiting += count * link.on(spec, "tensor").seconds(
            tensor(network, work, part, block), len(network.blocks[block].sums) + len(network.blocks[block].norms) + 2
        )
    waiting += link.on(spec, "distri", "ring", "ulysses").seconds(joined(network, work, part))
    compute_s = flops / device.flops_per_s
    return compute_s, waiting + _distri_waits(network, work, part, link, compute_s)


def _flops(network: Network, part: RankShare) -> float:
    """Operations of the matrices in this rank's rows, tokens and stage, and of attention to what it has whole.

    Embedders run on the first stage.
    """
    tokens = {stream: sizes[part.shard] for stream, sizes in part.shards.items()}
    per_row = 0.0
    for block, count in network.kinds(part.blocks).items():
        for streams, elements in network.blocks[block].multiplied.items():
            number = sum(tokens[stream] for stream in streams) if streams else 1
            per_row += count * 2 * elements * number / part.spec.tensor
        for queries, keys in network.blocks[block].crossing:
            per_row += count * attention_flops(queries, keys, tokens, network.hidden) / part.spec.tensor
    if part.index["pipe"] == 0:
        per_row += network.outside.linear_flops(tokens)
    return part.rows * per_row


def _attention_flops(network: Network, part: RankShare, streams: tuple[str, ...]) -> float:
    """Its queries (of its group, for its heads) to all keys."""
    whole = {stream: sum(sizes) for stream, sizes in part.shards.items()}
    all_tokens = sum(whole[stream] for stream in streams)
    queries = part.group_tokens(streams) / max(all_tokens, 1)
    heads = part.own_heads / network.shape.num_heads
    return part.rows * queries * heads * attention_flops(streams, streams, whole, network.hidden)


def _ring_waits(
    network: Network, work: Work, part: RankShare, streams: tuple[str, ...], link: Links, attention_s: float
) -> float:
    """What of each hop outlasts the attention to the block that is there meanwhile."""
    hops = part.spec.ring - 1
    if not hops:
        return 0.0
    hop_s = link.on(part.spec, "ring").seconds(ring(network, work, part, streams), hops) / hops
    return hops * max(0.0, hop_s - attention_s / part.spec.ring)


def _distri_waits(network: Network, work: Work, part: RankShare, link: Links, compute_s: float) -> float:
    """Spread over the job: exact evaluations wait for each gather, the others for what of the one before's outlasts
    their compute; the last has nobody to gather for.
    """
    if part.spec.distri == 1:
        return 0.0
    gathers_s = sum(
        count * link.on(part.spec, "distri").seconds(distri(network, work, part, streams))
        for block, count in network.kinds(part.blocks).items()
        for streams in network.blocks[block].attention
    )
    exact = _warm(work)
    beside = max(0.0, 1 - exact - 1 / work.num_evaluations)
    return exact * gathers_s + beside * max(0.0, gathers_s - compute_s)


def _pipelined(
    network: Network, work: Work, spec: ParallelSpec, link: Links, stage_s: float, serial_s: float
) -> float:
    """An evaluation through the stages: a full pipeline, but for warming up and for filling it once.

    stage_s: the slowest stage's time for all patches; serial_s: of all stages, one after the other.
    """
    stages, part = spec.pipe, part_of(network, work, spec, 0)
    patches = work.num_patches or usual_patches(part.shard_tokens(("image",)), stages)
    hop_bytes = part.rows * part.shard_tokens(network.cut) * network.hidden * work.element_bytes
    hops = link.on(spec, "pipe")
    # Rows follow each other through the stages in an exact evaluation.
    rows = max(part.rows, 1)
    serial = serial_s * (rows + stages - 1) / (rows * stages) + (stages - 1) * hops.seconds({"p2p": hop_bytes / rows})
    full = max(stage_s, hops.seconds({"p2p": hop_bytes}, patches))
    fill = (stages - 1) * (full / patches + hops.seconds({"p2p": hop_bytes / patches}))
    warm = _warm(work)
    return serial if warm == 1 else warm * serial + (1 - warm) * full + fill / work.num_evaluations


def _sent(network: Network, work: Work, spec: ParallelSpec, rank: int) -> int:
    """Bytes in one evaluation, on average."""
    if all(getattr(spec, axis) == 1 for axis in APPROXIMATE):
        return sent(network, work, spec, rank).total()
    return sent_in_job(network, work, spec, rank).total() // work.num_evaluations


def _warm(work: Work) -> float:
    """The share of evaluations that are exact with methods that reuse activations."""
    return min(1.0, max(work.warmup, 1) / work.num_evaluations)
