"""What each rank did when in one sampling run: a Chrome trace, and a picture of it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from comfy_xdit.messages import LoadModel
from comfy_xdit.parallel.spec import AXES, ParallelSpec
from comfy_xdit.timeline.files import write
from comfy_xdit.timeline.job import JobReport

from .bench_pool import bench_pool
from .checkpoint import FluxSize, random_call, write_flux
from .program import whole_run
from .show import json_argument, show

MODEL = "trace"


def trace(
    specs: list[ParallelSpec], *, tokens: int, num_steps: int, size: FluxSize, folder: Path, num_patches: int = 0
) -> dict[str, JobReport]:
    """A run of a random Flux with each spec, all of as many ranks; `folder` takes its checkpoint.

    A run of few steps beforehand makes the process groups and warms the kernels.
    """
    path = str(write_flux(folder / "trace.safetensors", size))
    call = random_call(size, tokens=tokens)
    load = LoadModel(
        model=MODEL, path=path, prefix="", family="flux", storage_dtype="float32", compute_dtype="float32"
    )
    jobs = {}
    with bench_pool(specs[0].num_ranks) as pool, pool.lease():
        for spec in specs:
            pool.call(dataclasses.replace(load, spec=spec))
            pool.call(whole_run(MODEL, call, spec, num_evaluations=2, num_patches=num_patches))
            message = whole_run(MODEL, call, spec, num_evaluations=num_steps, num_patches=num_patches, trace=True)
            jobs[str(spec)] = JobReport.of([[result.report for result in pool.call_all(message)]])
    return jobs


def spec_named(text: str) -> ParallelSpec:
    """The spec of "pipe=2" or "cfg=2,ulysses=2". Raises ValueError for anything else."""
    parts = [part.partition("=") for part in text.split(",")]
    for axis, _, degree in parts:
        if axis not in AXES or not degree.isdecimal():
            raise ValueError(f"{text!r} is no spec; write degrees as pipe=2 or cfg=2,ulysses=2 ({', '.join(AXES)})")
    return ParallelSpec(**{axis: int(degree) for axis, _, degree in parts})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("specs", nargs="*", default=["ulysses=2", "pipe=2"], help="as pipe=2 or cfg=2,ulysses=2")
    parser.add_argument("--trace", type=Path, default=Path("trace.json"), metavar="FILE", help="the Chrome trace")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture (default: the trace's name, .png)")
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens (default: 1024)")
    parser.add_argument("--steps", type=int, default=6, help="steps of the sampler (default: 6)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model (default: 256)")
    parser.add_argument("--patches", type=int, default=0, help="of PipeFusion (default: as many as suit the image)")


def run(args: argparse.Namespace) -> int:
    """Run, write both files, and print the times of each rank. Raises ValueError for specs that don't go together."""
    import tempfile

    specs = [spec_named(text) for text in args.specs]
    if len({spec.num_ranks for spec in specs}) > 1:
        raise ValueError(f"{' and '.join(args.specs)} have different numbers of ranks; trace them one by one")
    size = FluxSize(hidden=args.hidden, head_dim=64, double_blocks=2, single_blocks=4)
    with tempfile.TemporaryDirectory() as folder:
        jobs = trace(
            specs,
            tokens=args.tokens,
            num_steps=args.steps,
            size=size,
            folder=Path(folder),
            num_patches=args.patches,
        )
    picture = args.out or args.trace.with_suffix(".png")
    write(jobs, args.trace, picture)
    rows = [
        {"method": title, "rank": rank, **{name: numbers[name] for name in NUMBERS}}
        for title, job in jobs.items()
        for rank, numbers in enumerate(job.steps[0].reports[0]["ranks"])
    ]
    result = {
        "compared": f"{args.steps} steps of a random Flux of {args.hidden} x 6 with {args.tokens} image tokens",
        "rows": rows,
        "trace": str(args.trace),
        "picture": str(picture),
    }
    return show(result, as_json=args.json)


NUMBERS = ("seconds", "compute_seconds", "communication_seconds", "idle_seconds", "peak_bytes")
"""Of a rank's report, in the table."""
