"""Bytes that a rank sends in a whole sampling run on the workers: to the byte, with pipelines and old keys too."""

from __future__ import annotations

from collections import Counter

from comfy_xdit.parallel.latent_tokens import Grid
from comfy_xdit.parallel.patch_rows import cut_rows, pixel_rows
from comfy_xdit.parallel.patch_tokens import shared_run
from comfy_xdit.parallel.spec import ParallelSpec

from .arithmetic import Network
from .formulas import distri, joined, key_bytes, sent, shared, tensor, ulysses
from .work import RankShare, Work, part_of

LOOP_BYTES = 4
"""Of a number in the sampler's state, which is kept in fp32: what goes to the host."""


def sent_in_job(network: Network, work: Work, spec: ParallelSpec, rank: int) -> Counter[str]:
    """Bytes that leave `rank`, for a sampler with one evaluation and one preview a step."""
    if spec.pipe > 1:
        return _pipeline(network, work, spec, rank)
    once = sent(network, work, spec, rank)
    total = Counter({name: count * work.num_evaluations for name, count in once.items()})
    part = part_of(network, work, spec, rank)
    if part.rows and work.warmup < work.num_evaluations:
        for block in network.blocks:
            for streams in block.attention:
                # The last evaluation's keys would be for the next one.
                total -= distri(network, work, part, streams)
    return total


def _pipeline(network: Network, work: Work, spec: ParallelSpec, rank: int) -> Counter[str]:
    height, _ = work.latent
    grid = Grid.of(work.latent, network.latent_patch)
    rows = cut_rows(
        grid,
        num_patches=work.num_patches,
        num_stages=spec.pipe,
        num_shards=spec.ring * spec.ulysses,
    )
    frames = -(-work.frames // network.latent_frames)
    patches = [len(part) * grid.columns * frames for part in rows]
    heights = [pixels.stop - pixels.start for pixels in (pixel_rows(grid, part, height) for part in rows)]
    # At least one evaluation is exact: it fills the buffers.
    num_exact = min(max(work.warmup, 1), work.num_evaluations)
    whole = work.tokens(network)
    texts = [whole["text"]] * len(patches)
    if "text" in network.cut:
        least = spec.ring * spec.ulysses
        texts = [shared_run(whole["text"], number, len(patches), least)[1] for number in range(len(patches))]
    parts = [{"text": text, "image": count} for text, count in zip(texts, patches, strict=True)]
    total: Counter[str] = Counter()
    for tokens, times in [(whole, num_exact), *((tokens, work.num_evaluations - num_exact) for tokens in parts)]:
        part = part_of(network, work, spec, rank, tokens)
        for name, count in _forward(network, work, part).items():
            total[name] += count * times
    if total or part.rows:
        total += _replies(network, work, part, heights)
    return +total


def _forward(network: Network, work: Work, part: RankShare) -> Counter[str]:
    """What one stage sends for one patch, or for all tokens."""
    total: Counter[str] = Counter()
    if not part.rows:
        return total
    for number in part.blocks:
        for streams in network.blocks[number].attention:
            total += ulysses(network, work, part, streams)
            total += _gathered(network, work, part, streams)
        total += tensor(network, work, part, number)
    if part.index["pipe"] + 1 < part.spec.pipe:
        tokens = part.shard_tokens(network.cut)
        total += Counter(p2p=part.rows * tokens * network.hidden * work.element_bytes)
    else:
        total += joined(network, work, part)
    return total


def _gathered(network: Network, work: Work, part: RankShare, streams: tuple[str, ...]) -> Counter[str]:
    """On the ring axis each rank's keys and values go to all, padded to the longest: as much as a ring sends."""
    degree = part.spec.ring
    longest = max(part.group_tokens(streams, ring=place) for place in range(degree))
    return Counter(all_gather=key_bytes(network, work, part) * longest * (degree - 1))


def _replies(network: Network, work: Work, part: RankShare, heights: list[int]) -> Counter[str]:
    """What the last stage makes of the outputs: lanes share them, the first stage gets the next input, the host
    gets previews and the result."""
    if part.index["pipe"] + 1 < part.spec.pipe:
        return Counter()
    numbers = work.images * work.frames * sum(heights) * work.latent[1] * network.latent_outputs
    total = Counter(p2p=numbers * work.element_bytes * (work.num_evaluations - 1))
    if not any(index for axis, index in part.index.items() if axis != "pipe"):
        total += Counter(p2p=numbers * LOOP_BYTES * (work.num_evaluations + 1))
    for height in heights:
        for name, count in shared(network, work, part, height=height).items():
            total[name] += count * work.num_evaluations
    return total
