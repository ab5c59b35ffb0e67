"""What a job on many ranks gives, worked out in one process: a thread for each rank, each with diffusers' own model.

A rank computes the tokens that it holds; at each attention the ranks of a lane meet, and each sees of the others'
queries, keys and values what its method lets it see. Nothing of the engine's attention, hooks, cuts, pipelines and
communication is used; but numbers are added in its order, so that results can be compared bit for bit.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from oracle_rows import FORWARDS, Spans, copied, latent_of, token_counts
from torch import Tensor, nn

from comfy_xdit.parallel.paths import find
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.tensor_plan import TensorPlan
from comfy_xdit.trajectory import Replay

Keys = tuple[Tensor, ...]
"""Keys and values, [batch, heads, tokens, head dim] each."""

Row = tuple[int, int]
"""Conditioning and image."""


def emulate(
    model: Any, job: dict[str, Any], spec: ParallelSpec, *, num_patches: int = 0, warmup_steps: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """The samples of a whole run with `spec`, and its previews. No masks of attention, no reference images.

    model: a whole one, with family, module and compute_dtype. job: program, noise, latent, noises, conds and
    perhaps mask of a `Sample`. num_patches: of PipeFusion, one that fits; the number of stages is no matter.
    Keys of tokens that are not computed, or not seen fresh, are those that were computed last with the same
    conditionings; the first time, all tokens are computed.
    """
    module, program = in_shards(model.module, model.family.plan.tensor, spec.tensor), job["program"]
    fields = {name: job[name] for name in ("noise", "latent", "noises", "mask") if name in job}
    replay = Replay(program, **fields, dtype=job["noise"].dtype)
    lanes: dict[Any, Lane] = {}
    previews = []
    for number, call in enumerate(program.calls):
        x = replay.model_input(number)
        rows = [(index, image) for index in call.conds for image in range(len(x))]
        outputs: dict[Row, Tensor] = {}
        for place, own in enumerate(dealt(rows, spec.cfg, spec.dp)):
            for part, batch in enumerate(batches(own, job["conds"])):
                key = (tuple(call.conds), place, part)
                is_exact = number < warmup_steps or key not in lanes
                lane = lanes.setdefault(key, Lane(model, module, spec, num_patches))
                made = lane.evaluate(call_of(batch, x, call.timestep, job["conds"], model), is_exact=is_exact)
                outputs |= zip(batch, made, strict=True)
        whole = [torch.stack([outputs[index, image] for image in range(len(x))]) for index in call.conds]
        replay.answer(number, whole)
        previews += [preview.denoised for preview in replay.previews(number)]
    return replay.output(), previews


def dealt(rows: list[Row], cfg: int, dp: int) -> Iterator[list[Row]]:
    """The rows of each lane: runs of them, cut over cfg, then over dp."""
    for run in torch.arange(len(rows)).tensor_split(cfg):
        for part in run.tensor_split(dp):
            yield [rows[row] for row in part]


def batches(rows: list[Row], conds: list[dict]) -> list[list[Row]]:
    """What goes through the model together: all rows if their texts are of one length, else those of each text."""
    lengths = {index: conds[index]["context"].shape[1] for index, _ in rows}
    if len(set(lengths.values())) == 1:
        return [rows]
    return [[row for row in rows if row[0] == index] for index in lengths]


def call_of(batch: list[Row], x: Tensor, timestep: float, conds: list[dict], model: Any) -> dict[str, Any]:
    """The model's call. What a lone conditioning has once for all images stays so."""
    alone = len({index for index, _ in batch}) == 1
    call = {}
    for name, value in conds[batch[0][0]].items():
        values = [conds[index][name] for index, _ in batch]
        rows = [each[image if len(each) > 1 else 0] for each, (_, image) in zip(values, batch, strict=True)]
        call[name] = value if alone and len(value) == 1 else torch.stack(rows)
    call["x"] = torch.stack([x[image] for _, image in batch]).to(model.compute_dtype)
    return {**call, "timestep": torch.full((len(batch),), timestep)}


class Lane:
    """The ranks that compute the same rows, and the keys that they keep from one evaluation to the next."""

    def __init__(self, model: Any, module: nn.Module, spec: ParallelSpec, num_patches: int) -> None:
        self.model, self.module, self.spec, self.num_patches = model, module, spec, num_patches
        self.num_ranks = spec.distri * spec.ring * spec.ulysses
        self.kept: dict[tuple[int, int], Any] = {}

    def evaluate(self, call: dict[str, Any], *, is_exact: bool) -> Tensor:
        """The model's output: of all tokens at once, or patch after patch, each with its share of the text."""
        if self.num_patches and is_exact and len(call["x"]) > 1:
            return self._row_after_row(call)
        arguments = self.model.family.inputs(dict(self.module.config), call)
        counts = token_counts(self.model, arguments)
        height, width = (-(-side // 2) for side in call["x"].shape[-2:])
        assert counts["image"] == height * width, "the oracle knows no reference images"
        segments: list[Spans] = [{stream: (0, count) for stream, count in counts.items()}]
        if self.num_patches and not is_exact:
            lines = [(int(part[0]), len(part)) for part in torch.arange(height).tensor_split(self.num_patches)]
            segments = [{"image": (first * width, number * width)} for first, number in lines]
            for number, spans in enumerate(segments if "text" in counts else ()):
                spans["text"] = self._share(counts["text"], number)
        tokens = torch.cat([self._compute(arguments, counts, rows, is_exact) for rows in segments], 1)
        return latent_of(self.model, tokens, height, width)[..., : call["x"].shape[-2], : call["x"].shape[-1]]

    def _share(self, length: int, number: int) -> tuple[int, int]:
        """A patch's part of `length` tokens: even parts, or, where some ranks would have none, parts that overlap."""
        if length >= self.num_patches * self.num_ranks:
            own = torch.arange(length).tensor_split(self.num_patches)[number]
            return int(own[0]), len(own)
        return number * (length - self.num_ranks) // max(self.num_patches - 1, 1), self.num_ranks

    def _row_after_row(self, call: dict[str, Any]) -> Tensor:
        """As stages do it, so that all have something to do."""
        num_rows, made, kept = len(call["x"]), [], []
        for row in range(num_rows):
            alone = {name: value[row : row + 1] if len(value) == num_rows else value for name, value in call.items()}
            self.kept = {}
            made.append(self.evaluate(alone, is_exact=True))
            kept.append(self.kept)
        self.kept = {key: tuple(map(torch.cat, zip(*(each[key] for each in kept), strict=True))) for key in kept[0]}
        return torch.cat(made)

    def _compute(self, arguments: dict[str, Any], counts: dict[str, int], rows: Spans, is_exact: bool) -> Tensor:
        """The output of the image tokens among `rows`."""
        family, ranks = self.model.family.name, range(self.num_ranks)
        own = [{stream: part_of(rows[stream], rank, len(ranks)) for stream in counts} for rank in ranks]
        starts = dict(zip(counts, (0, *counts.values()), strict=False))
        places = [torch.cat([torch.arange(part[s][0], sum(part[s])) + starts[s] for s in counts]) for part in own]
        meeting = Meeting(len(ranks))

        def rank_of(rank: int) -> Tensor:
            def attend(layer: int, *qkv: Tensor) -> tuple[Tensor, ...]:
                # Of each PixArt block's two attentions the second is to the text, which every rank has.
                if family == "pixart" and layer % 2:
                    return *qkv, 0
                return self._attend(layer, rank, meeting.all(rank, qkv), places, is_exact)

            HERE.attend, HERE.layer = attend, 0
            take = Tensor.narrow if all(own[rank][s] == (0, counts[s]) for s in counts) else copied
            return take(FORWARDS[family](self.module, arguments, own[rank], take), 1, *own[rank]["image"])

        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            return torch.cat(meeting.run(rank_of), 1)

    def _attend(
        self, layer: int, rank: int, seen: list[Keys], places: list[Tensor], is_exact: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Queries, keys and values, and the first of the queries that is the rank's own.

        Queries are the whole ulysses group's, as they are after an all-to-all: kernels round by their number.
        """
        beside = rank // self.spec.ulysses * self.spec.ulysses
        queries = torch.cat([seen[peer][0] for peer in range(beside, beside + self.spec.ulysses)], 2)
        place = sum(seen[peer][0].shape[2] for peer in range(beside, rank))
        keys = self._old_ranks if self.spec.distri > 1 else self._old_places
        return queries, *keys((rank, layer), [tuple(each[1:]) for each in seen], places, is_exact), place

    def _old_ranks(self, key: tuple[int, int], fresh: list[Keys], places: list[Tensor], is_exact: bool) -> Keys:
        """DistriFusion: of ranks elsewhere on the axis those of the evaluation before."""
        inner, before = self.spec.ring * self.spec.ulysses, self.kept.get(key)
        self.kept[key] = fresh
        sources = [
            now if is_exact or peer // inner == key[0] // inner else before[peer] for peer, now in enumerate(fresh)
        ]
        return tuple(torch.cat(parts, 2) for parts in zip(*sources, strict=True))

    def _old_places(self, key: tuple[int, int], fresh: list[Keys], places: list[Tensor], is_exact: bool) -> Keys:
        """PipeFusion: each token's in its place in the whole sequence, until it is computed again."""
        if is_exact:
            length = sum(k.shape[2] for k, _ in fresh)
            self.kept[key] = tuple(x.new_empty((*x.shape[:2], length, x.shape[3])) for x in fresh[0])
        for peer, now in enumerate(fresh):
            for old, new in zip(self.kept[key], now, strict=True):
                # A layer of one stream has the first alone.
                old[:, :, places[peer][: new.shape[2]]] = new
        return self.kept[key]


def part_of(span: tuple[int, int], rank: int, num_ranks: int) -> tuple[int, int]:
    """The rank's part of a run of tokens (first, number)."""
    own = torch.arange(span[0], sum(span)).tensor_split(num_ranks)[rank]
    return (int(own[0]), len(own)) if len(own) else (span[0], 0)


class Meeting:
    """Threads that wait for each other."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks)
        self._brought: list[Any] = [None] * num_ranks

    def run(self, function: Callable[[int], Tensor]) -> list[Tensor]:
        """`function(rank)` of every rank. Raises what the first one raised."""
        results: list[Any] = list(self._brought)
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                with torch.inference_mode():
                    results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def all(self, rank: int, brought: Any) -> list[Any]:
        """What every rank brought; all must come."""
        self._brought[rank] = brought
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        return found


PLAIN = F.scaled_dot_product_attention
HERE = threading.local()
"""attend: what this thread's attentions ask; layer: the number of the next one."""



def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> Tensor:
    assert attn_mask is None, "the oracle knows no masks"
    layer, HERE.layer = HERE.layer, HERE.layer + 1
    queries, keys, values, first = HERE.attend(layer, query, key, value)
    return PLAIN(queries, keys, values, scale=scale)[:, :, first : first + query.shape[2]]


def in_shards(module: nn.Module, plan: TensorPlan, degree: int) -> nn.Module:
    """The module with each matrix that tensor parallel cuts in shards, whose results are put together or added."""
    if degree == 1:
        return module
    module = copy.deepcopy(module)
    kinds: dict[str, Any] = dict.fromkeys((*plan.columns, *plan.joined), Columns)
    kinds |= {pattern: functools.partial(Rows, pieces=pieces) for pattern, pieces in plan.rows.items()}
    for pattern, kind in kinds.items():
        for path, linear in find(module, pattern):
            parent, _, name = path.rpartition(".")
            module.get_submodule(parent)._modules[name] = kind(linear, degree)
    return module


class Columns(nn.Module):
    """A Linear of which each rank has some outputs."""

    def __init__(self, linear: nn.Linear, degree: int) -> None:
        super().__init__()
        biases = linear.bias.chunk(degree) if linear.bias is not None else [None] * degree
        self.shards = list(zip(linear.weight.chunk(degree), biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, *shard) for shard in self.shards], -1)


class Rows(nn.Module):
    """A Linear of which each rank has some inputs, joined from `pieces`, and the first the bias."""

    def __init__(self, linear: nn.Linear, degree: int, pieces: tuple[int, ...]) -> None:
        super().__init__()
        self.pieces, self.degree = pieces, degree
        self.weights = self._cut(linear.weight)
        self.biases = [linear.bias, *[None] * (degree - 1)]

    def forward(self, x: Tensor) -> Tensor:
        parts = self._cut(x)
        if not x.is_contiguous():
            # A Linear adds its bias within the product only where its input is in one piece.
            parts = [F.pad(part, (0, 0, 0, 1))[:, :-1] for part in parts]
        return functools.reduce(operator.add, map(F.linear, parts, self.weights, self.biases))

    def _cut(self, x: Tensor) -> list[Tensor]:
        unit = x.shape[-1] // sum(self.pieces)
        parts = [part.chunk(self.degree, -1) for part in x.split([unit * piece for piece in self.pieces], -1)]
        return [torch.cat(shard, -1) for shard in zip(*parts, strict=True)]
