"""What the pool costs: one rank through it against the same model called in this process."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from comfy_xdit.parallel.spec import ParallelSpec

from .bench_pool import Contest, bench_pool, relative_difference
from .checkpoint import FluxSize, random_call
from .show import json_argument, show
from .timing import ratio, take_turns


def overhead(*, tokens: int = 512, num_turns: int = 9) -> dict[str, Any]:
    """Both with one thread, in turn; `ratio` is pool over in-process, medians."""
    size = FluxSize(hidden=256, double_blocks=2, single_blocks=4)
    call = random_call(size, tokens=tokens)
    with tempfile.TemporaryDirectory() as folder, bench_pool(1) as pool:
        contest = Contest(Path(folder), size)
        with pool.lease():
            pool.call(contest.message)
            outputs: dict[str, Any] = {}

            def through_pool() -> None:
                outputs["pool"] = contest.on_pool(pool, call, ParallelSpec()).value[0]

            def in_process() -> None:
                outputs["process"] = contest.in_process(call)

            times = take_turns({"pool": through_pool, "in process": in_process}, num_turns=num_turns)
    return {
        "compared": f"one step of a random Flux, {tokens} image tokens: a pool of one rank; this process; 1 thread",
        "rows": [
            {"what": name, "median_s": time.median_s, "fastest_s": time.fastest_s, "slowest_s": time.slowest_s}
            for name, time in times.items()
        ],
        "ratio": ratio(times["pool"], times["in process"]),
        "relative_difference": relative_difference(outputs["pool"], outputs["process"]),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--tokens", type=int, default=512, help="image tokens (default: 512)")
    parser.add_argument("--turns", type=int, default=9, help="timed turns of each (default: 9)")


def run(args: argparse.Namespace) -> int:
    return show(overhead(tokens=args.tokens, num_turns=args.turns), as_json=args.json)
