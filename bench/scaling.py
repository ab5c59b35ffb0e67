"""What each parallel method gains: N ranks with one thread each against one process with one thread."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from comfy_xdit.cost.arithmetic import Network, read_network
from comfy_xdit.cost.choose import predict
from comfy_xdit.cost.links import Device, Links
from comfy_xdit.cost.measured import measure
from comfy_xdit.cost.work import Work
from comfy_xdit.messages import Result, Sample
from comfy_xdit.parallel.spec import APPROXIMATE, ParallelSpec
from comfy_xdit.pool.client import Pool

from .bench_pool import Contest, bench_pool, relative_difference
from .checkpoint import FluxSize, random_call
from .program import whole_run
from .show import json_argument, show
from .timing import Timing, ratio, take_turns

BATCHED, ALONE, WHOLE = ("cfg", "dp"), ("ulysses", "ring"), ("tensor", "pipe", "distri")
"""One evaluation of as many rows as ranks; of one row; and whole runs of one row."""

METHODS = (*BATCHED, *ALONE, *WHOLE)

EXACT_LIMIT = 1e-5
"""How far, relative to the largest number, the order of sums may carry a method that is exact."""

RUN_TIMEOUT_S = 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """num_evaluations, warmup_steps, num_patches and chunks are of whole runs.

    num_patches: 0 lets the ranks choose; chunks: 1, or 2 for cond and uncond.
    """

    num_ranks: int = 2
    num_turns: int = 3
    methods: tuple[str, ...] = METHODS
    num_evaluations: int = 28
    warmup_steps: int = 1
    num_patches: int = 0
    chunks: int = 1


def scaling(tokens: Sequence[int], size: FluxSize, settings: Settings) -> dict[str, Any]:
    """A row for each method and number of image tokens; and for whole runs a row for each rank under "ranks"."""
    rows: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, bench_pool(settings.num_ranks) as pool:
        contest = Contest(Path(folder), size)
        with pool.lease():
            pool.call(contest.message)
            link, device = measure(pool)
            bench = Bench(contest, pool, settings, read_network(contest.message.path), link, device)
            for count in tokens:
                rows += bench.evaluations(count, BATCHED, batch=settings.num_ranks)
                rows += bench.evaluations(count, ALONE, batch=1)
                found, shares = bench.runs(count)
                rows, ranks = rows + found, ranks + shares
    return {
        "compared": (
            f"seconds of one evaluation of a random Flux (hidden {size.hidden}, {size.double_blocks} + "
            f"{size.single_blocks} blocks), alone or in a run{', with cond and uncond' * (settings.chunks - 1)}"
            f": {settings.num_ranks} ranks with 1 thread each; 1 process with 1 thread; 1 process with "
            f"{settings.num_ranks} threads"
        ),
        "rows": rows,
        "ranks": ranks,
    }


class Bench:
    """The methods on one pool, and their rivals in this process."""

    def __init__(
        self, contest: Contest, pool: Pool, settings: Settings, network: Network, link: Links, device: Device
    ) -> None:
        self._contest, self._pool, self._settings = contest, pool, settings
        self._network, self._link, self._device = network, link, device

    def evaluations(self, tokens: int, methods: tuple[str, ...], *, batch: int) -> list[dict[str, Any]]:
        """Rows of the methods that take the same batch: single evaluations, all in one contest."""
        num_ranks = self._settings.num_ranks
        specs = self._specs(methods)
        call = random_call(self._contest.size, tokens=tokens, batch=batch)
        outputs: dict[str, Tensor] = {}

        def run_on_pool(axis: str) -> None:
            outputs[axis] = self._contest.on_pool(self._pool, call, specs[axis], chunks=batch).value[0]

        def run_here(num_threads: int) -> None:
            outputs["here"] = self._contest.in_process(call, chunks=batch, num_threads=num_threads)

        contestants: dict[str, Callable[[], None]] = {axis: partial(run_on_pool, axis) for axis in specs}
        contestants |= {"1 thread": partial(run_here, 1), "threads": partial(run_here, num_ranks)}
        times = take_turns(contestants, num_turns=self._settings.num_turns) if specs else {}
        return [
            self._row(
                tokens,
                spec,
                times[axis],
                times["1 thread"],
                threads=times["threads"],
                work=self._work(call, images=batch if axis == "dp" else 1, chunks=batch if axis == "cfg" else 1),
                difference=relative_difference(outputs[axis], outputs["here"]),
            )
            for axis, spec in specs.items()
        ]

    def runs(self, tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of the methods that show in a whole run, and the shares of each rank's time."""
        settings, specs = self._settings, self._specs(WHOLE)
        call = random_call(self._contest.size, tokens=tokens, batch=settings.chunks)
        results: dict[str, list[list[Result]]] = {axis: [] for axis in specs}
        outputs: dict[str, Tensor] = {}
        for spec in specs.values():
            self._pool.call(dataclasses.replace(self._contest.message, model=str(spec), spec=spec))

        def run_on_pool(axis: str, message: Sample) -> None:
            results[axis].append(self._pool.call_all(message, timeout_s=RUN_TIMEOUT_S))

        def run_here(message: Sample) -> None:
            outputs["here"] = self._contest.run_in_process(message)

        def contestants(num_evaluations: int) -> dict[str, Callable[[], None]]:
            found: dict[str, Callable[[], None]] = {
                axis: partial(run_on_pool, axis, self._run(call, spec, num_evaluations)) for axis, spec in specs.items()
            }
            return {**found, "1 thread": partial(run_here, self._run(call, ParallelSpec(), num_evaluations))}

        if not specs:
            return [], []
        short = contestants(settings.warmup_steps + 1)
        times = take_turns(contestants(settings.num_evaluations), num_turns=settings.num_turns, warm=short)
        work = self._work(call, num_evaluations=settings.num_evaluations, chunks=settings.chunks)
        rows, ranks = [], []
        for axis, spec in specs.items():
            turns = results[axis][1:]
            difference = relative_difference(turns[-1][0].value, outputs["here"])
            row = self._row(tokens, spec, times[axis], times["1 thread"], work=work, difference=difference)
            if row["exact"] < row["evaluations"]:
                row |= _apart([found[-1].report for found in turns], row)
            rows.append(row)
            ranks += _shares(tokens, spec, [found[0].report["ranks"] for found in turns])
        return rows, ranks

    def _specs(self, methods: tuple[str, ...]) -> dict[str, ParallelSpec]:
        wanted = [axis for axis in methods if axis in self._settings.methods]
        return {axis: ParallelSpec(**{axis: self._settings.num_ranks}) for axis in wanted}

    def _run(self, call: dict[str, Tensor], spec: ParallelSpec, num_evaluations: int) -> Sample:
        settings = self._settings
        reuse = {"num_patches": settings.num_patches, "warmup_steps": settings.warmup_steps}
        # Traced: where evaluations begin tells the warm-up from the rest.
        wanted = {"num_evaluations": num_evaluations, "chunks": settings.chunks, "trace": True}
        return whole_run(str(spec), call, spec, **wanted, **reuse)

    def _work(self, call: dict[str, Tensor], *, num_evaluations: int = 1, images: int = 1, chunks: int = 1) -> Work:
        height, width = call["x"].shape[-2:]
        return Work(
            latent=(height, width),
            text_tokens=call["context"].shape[1],
            images=images,
            chunks=chunks,
            element_bytes=call["x"].element_size(),
            num_evaluations=num_evaluations,
            warmup=self._settings.warmup_steps,
            num_patches=self._settings.num_patches,
        )

    def _row(
        self,
        tokens: int,
        spec: ParallelSpec,
        time: Timing,
        alone: Timing,
        *,
        work: Work,
        difference: float,
        threads: Timing | None = None,
    ) -> dict[str, Any]:
        number = work.num_evaluations
        is_exact = all(getattr(spec, axis) == 1 for axis in APPROXIMATE)
        seconds = [
            predict(self._network, work, each, self._link, self._device).step_s for each in (ParallelSpec(), spec)
        ]
        return {
            "method": str(spec),
            "tokens": tokens,
            "evaluations": number,
            "exact": number if is_exact else min(number, max(work.warmup, 1)),
            "median_s": time.median_s / number,
            "one_thread_s": alone.median_s / number,
            "gain": ratio(alone, time),
            "predicted": seconds[0] / seconds[1],
            "warm_up": None,
            "gain_after": None,
            "over_threads": ratio(threads, time) if threads is not None else None,
            "difference": difference,
        }


def _apart(reports: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """The share of a run's time that its exact evaluations take, and the gain of the others.

    reports: the last rank's, of each run. With pipe the first of the others fills the pipeline, and isn't counted.
    """
    warm_up, after = [], []
    for report in reports:
        marks, end = report["evaluations"], report["began"] + report["seconds"]
        warm_up.append((marks[row["exact"]] - report["began"]) / report["seconds"])
        counted = marks[row["exact"] + 1 :]
        after += [(end - counted[0]) / len(counted)] if counted else []
    return {
        "warm_up": statistics.median(warm_up),
        "gain_after": row["one_thread_s"] / statistics.median(after) if after else None,
    }


def _shares(tokens: int, spec: ParallelSpec, reports: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each rank over all runs: which parts of its time went where, and its peak."""
    rows = []
    for rank, of_rank in enumerate(zip(*reports, strict=True)):
        whole = sum(report["seconds"] for report in of_rank)
        parts = {
            name: sum(report[f"{name}_seconds"] for report in of_rank) / whole
            for name in ("compute", "communication", "idle")
        }
        peaks = [report["peak_bytes"] for report in of_rank if report["peak_bytes"] is not None]
        rows.append(
            {"method": str(spec), "tokens": tokens, "rank": rank, **parts, "peak_bytes": max(peaks, default=None)}
        )
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="numbers of image tokens")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each (default: 3)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--evaluations", type=int, default=28, help=f"in a run of {', '.join(WHOLE)}, the others make one (default: 28)"
    )
    parser.add_argument(
        "--chunks", type=int, choices=(1, 2), default=1, help="2: cond and uncond in each evaluation of a run"
    )
    parser.add_argument("--warmup", type=int, default=1, help="exact evaluations of pipe and distri (default: 1)")
    parser.add_argument("--patches", type=int, default=0, help="of pipe (default: as many as suit the image)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a method that is exact differs by more than rounding. ValueError for bad numbers."""
    for name, least in (("ranks", 2), ("turns", 1), ("warmup", 1), ("evaluations", args.warmup + 1), ("patches", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is too few; use {least} or more")
    settings = Settings(
        num_ranks=args.ranks,
        num_turns=args.turns,
        methods=tuple(args.methods),
        num_evaluations=args.evaluations,
        warmup_steps=args.warmup,
        num_patches=args.patches,
        chunks=args.chunks,
    )
    result = scaling(args.tokens, FluxSize(hidden=512, double_blocks=2, single_blocks=4), settings)
    show(result, as_json=args.json)
    return int(any(row["difference"] > EXACT_LIMIT for row in result["rows"] if row["exact"] == row["evaluations"]))
