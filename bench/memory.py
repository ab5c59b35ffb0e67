"""Where the weights are: bytes per rank and per machine, counted by the ranks and by the kernel."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from comfy_xdit.messages import Denoise
from comfy_xdit.parallel.spec import ParallelSpec

from .bench_pool import Contest, bench_pool
from .checkpoint import FluxSize, random_call
from .hosts import checkouts
from .parity import inside
from .show import json_argument, show


def memory(*, num_ranks: int = 2, hidden: int = 1024) -> dict[str, Any]:
    """A row for each rank, before and after the load.

    mapped_bytes: weights that are views of the file, shared by all ranks; private_bytes: this rank's own.
    resident_bytes, share_bytes: what the kernel says (Rss and Pss of smaps_rollup); Pss deals shared pages out,
    so that its sum over the ranks is what the machine spends.
    """
    size = FluxSize(hidden=hidden, double_blocks=2, single_blocks=4)
    with tempfile.TemporaryDirectory() as folder, bench_pool(num_ranks) as pool:
        contest = Contest(Path(folder), size)
        file_bytes = Path(contest.message.path).stat().st_size
        del contest.model
        # What a first job imports and allocates is no weight: a small model pays for it before the count begins.
        small = Contest(Path(tempfile.mkdtemp(dir=folder)), FluxSize(hidden=128))
        with pool.lease():
            pool.call(dataclasses.replace(small.message, model="small"))
            _touch(small, pool, "small")
            pids = [rank["pid"] for rank in pool.status()["ranks"]]
            before = [rollup(pid) for pid in pids]
            held = [result.value["bytes"] for result in pool.call_all(contest.message)]
            _touch(contest, pool, "bench")
            after = [rollup(pid) for pid in pids]
    rows = [
        {
            "rank": rank,
            "mapped_bytes": held[rank]["mapped"],
            "private_bytes": held[rank]["private"],
            "resident_grew_bytes": after[rank]["Rss"] - before[rank]["Rss"],
            "share_grew_bytes": after[rank]["Pss"] - before[rank]["Pss"],
        }
        for rank in range(num_ranks)
    ]
    return {
        "compared": f"{num_ranks} CPU ranks with a random Flux of {file_bytes} bytes, before and after load and a step",
        "file_bytes": file_bytes,
        "machine_grew_bytes": sum(row["share_grew_bytes"] for row in rows),
        "rows": rows,
    }


def _touch(contest: Contest, pool: Any, model: str) -> None:
    """Run a step, so that every page of the map has been used."""
    spec = ParallelSpec(dp=pool.num_ranks)
    call = random_call(contest.size, tokens=16, batch=pool.num_ranks)
    pool.call(Denoise(model=model, patches_id="", spec=spec, calls=[call], chunks=[1]))


def rollup(pid: int) -> dict[str, int]:
    """Bytes by field of /proc/<pid>/smaps_rollup (proc(5))."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            fields[name] = int(value.split()[0]) * 1024
    return fields


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--native", action="store_true", help="of a Qwen-Image of ComfyUI's own class, in a ComfyUI")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--comfyui", help="measure ComfyUI's process too (default: the first checkout found, if any)")


def run(args: argparse.Namespace) -> int:
    found = [Path(args.comfyui)] if args.comfyui else checkouts()
    if args.native:
        if not found:
            raise ValueError("no ComfyUI found; name a checkout with --comfyui, or set COMFYUI_DIR")
        degrees = [{axis: args.ranks} for axis in ("ulysses", "pipe")]
        (result,) = inside(found[0], ["--native-memory", json.dumps({"degrees": degrees})])
        return show(result, as_json=args.json)
    result = memory(num_ranks=args.ranks)
    if found:
        (skeleton,) = inside(found[0], ["--skeleton"])
        result |= {f"flux_dev_in_comfyui_{name}": value for name, value in skeleton.items()}
    return show(result, as_json=args.json)
