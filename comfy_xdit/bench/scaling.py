"""What each parallel method gains: N ranks against one thread, and against one process with N threads."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool

from .bench_pool import Contest, bench_pool, relative_difference
from .checkpoint import FluxSize, random_call
from .show import json_argument, show
from .timing import ratio, take_turns


def scaling(
    *, tokens: tuple[int, ...] = (1024, 2048, 4096), num_ranks: int = 2, num_turns: int = 3, hidden: int = 512
) -> dict[str, Any]:
    """A row for each method and number of image tokens.

    cfg and dp run a batch of `num_ranks` rows, which the two baselines run as one batch; the others one row.
    """
    size = FluxSize(hidden=hidden, double_blocks=2, single_blocks=4)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, bench_pool(num_ranks) as pool:
        contest = Contest(Path(folder), size)
        with pool.turn():
            pool.call(contest.message)
            for count in tokens:
                for batch, axes in ((num_ranks, ("cfg", "dp")), (1, ("ulysses", "ring"))):
                    rows += _group(contest, pool, count, batch, axes, num_ranks, num_turns)
    return {
        "compared": (
            f"one step of a random Flux (hidden {hidden}, {size.double_blocks} + {size.single_blocks} blocks): "
            f"{num_ranks} ranks with 1 thread each; 1 process with 1 thread; 1 process with {num_ranks} threads"
        ),
        "rows": rows,
    }


def _group(
    contest: Contest, pool: Pool, tokens: int, batch: int, axes: tuple[str, ...], num_ranks: int, num_turns: int
) -> list[dict[str, Any]]:
    """The methods that take the same batch, and their baselines, in one run."""
    call = random_call(contest.size, tokens=tokens, batch=batch)
    outputs: dict[str, Tensor] = {}

    def run_on_pool(axis: str) -> None:
        outputs[axis] = contest.on_pool(pool, call, ParallelSpec(**{axis: num_ranks}), chunks=batch).value[0]

    def run_here(num_threads: int) -> None:
        outputs["here"] = contest.in_process(call, chunks=batch, num_threads=num_threads)

    contestants: dict[str, Any] = {axis: lambda axis=axis: run_on_pool(axis) for axis in axes}
    contestants |= {"1 thread": lambda: run_here(1), "threads": lambda: run_here(num_ranks)}
    times = take_turns(contestants, num_turns=num_turns)
    return [
        {
            "method": f"{axis}={num_ranks}",
            "tokens": tokens,
            "median_s": times[axis].median_s,
            "one_thread_s": times["1 thread"].median_s,
            "threads_s": times["threads"].median_s,
            "against_one_thread": ratio(times["1 thread"], times[axis]),
            "against_threads": ratio(times["threads"], times[axis]),
            "relative_difference": relative_difference(outputs[axis], outputs["here"]),
        }
        for axis in axes
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="numbers of image tokens")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each (default: 3)")


def run(args: argparse.Namespace) -> int:
    result = scaling(tokens=tuple(args.tokens), num_ranks=args.ranks, num_turns=args.turns)
    return show(result, as_json=args.json)
