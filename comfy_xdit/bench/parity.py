"""`comfy-xdit parity`: stock ComfyUI against the pool, for every sampler, as the table of docs/parity.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .hosts import ROOT, checkouts, python_of, version_of

LIMIT = 1e-4

INTRODUCTION = """# Parity with stock ComfyUI

The largest difference between the latent of a run on the pool and ComfyUI's own, over the largest number in it:
same process, same seeds, fp32, 3 steps at cfg 3, a latent of 30 x 20 (150 tokens, which no degree divides evenly; for
PixArt 30 x 38, 285 tokens), tiny models with random weights. The limit is 1e-4. Schedulers take turns, so that each one
is met.

Runs are whole on the workers where the sampler allows it; "step by step" leaves the loop to ComfyUI.
`heun` with `ddim_uniform` stands out because it divides by a last sigma of 0.0006: noise of 1e-7 on the outputs of
ComfyUI's own model moves its result by 4e-5 (SD3) and 5e-4 (Flux).

Made by `comfy-xdit parity --out docs/parity.md`.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--comfyui", nargs="*", help="ComfyUI checkouts (default: those found)")
    parser.add_argument("--samplers", nargs="*", help="only these samplers")
    parser.add_argument("--out", help="write the table to this file too")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a result is beyond the limit."""
    found = [Path(entry) for entry in args.comfyui or ()] or checkouts()
    if not found:
        raise ValueError("no ComfyUI found; name a checkout with --comfyui, or set COMFYUI_DIR")
    text, worst = INTRODUCTION, 0.0
    for checkout in found:
        results = list(measure(checkout, args.samplers))
        text += f"\n## ComfyUI {version_of(checkout)}\n\n{table(results)}"
        worst = max([worst, *(result["error"] for result in results)])
    sys.stdout.write(text)
    if args.out:
        Path(args.out).write_text(text)
    return int(not worst <= LIMIT)


def measure(checkout: Path, samplers: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The results of one checkout, as `nodes/parity/measure.py` describes them. Raises ValueError when it fails."""
    return inside(checkout, ["--samplers", *samplers] if samplers else [])


def inside(checkout: Path, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """What `nodes/parity` prints in a ComfyUI checkout. Raises ValueError when it fails."""
    command = [python_of(checkout), str(ROOT / "nodes" / "parity" / "__main__.py"), "--comfyui", str(checkout)]
    command += arguments
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise ValueError(f"parity in {checkout} ended with status {process.returncode}; its own words are above")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each sampler, a column for each model and case."""
    columns = list(dict.fromkeys((result["kind"], result["case"]) for result in results))
    errors = {(r["sampler"], r["kind"], r["case"]): r["error"] for r in results}
    schedulers = {result["sampler"]: result["scheduler"] for result in results}
    lines = ["| sampler | scheduler | " + " | ".join(f"{kind} {case}" for kind, case in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for sampler, scheduler in schedulers.items():
        cells = (f"{errors[sampler, kind, case]:.0e}" for kind, case in columns)
        lines.append(f"| {sampler} | {scheduler} | " + " | ".join(cells) + " |")
    worst = (f"{max(errors[s, kind, case] for s in schedulers):.0e}" for kind, case in columns)
    lines.append("| **worst** | | " + " | ".join(worst) + " |")
    return "\n".join(lines) + "\n"
