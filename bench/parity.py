"""`comfy-xdit parity`: N ranks against one, and the pool against stock ComfyUI, as the tables of docs/parity.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from comfy_xdit.mount import PACKAGES

from .hosts import checkouts, python_of, version_of
from .matrix import against_one_rank
from .parity_tables import Result, drift_table, mode_table, sampler_table

ONE_RANK_LIMIT = 1e-5
HOST_LIMIT = 1e-4

NUM_RANKS = (2, 3, 4, 8)

INTRODUCTION = """# Parity

Differences are the largest one between two latents over the largest number in them, in fp32, on CPU ranks; tiny models
with random weights. Made by `comfy-xdit parity --out docs/parity.md`, which measures everything below anew.

- **Modes**: each method and its products with others, for each family. *1 rank*: N ranks against one, in a run of
  8 steps with guidance and three images, of a model with 6 heads and 5 blocks; the limit is 1e-5. *ComfyUI*: a run
  of the stock KSampler on the pool against ComfyUI's own in the same process, the worst of three samplers (euler,
  dpmpp_2m, dpmpp_2m_sde); the limit is 1e-4. pipe and distri with all evaluations exact. "-": the tiny model has too
  few heads or blocks.
- **Drift**: pipe and distri as they are meant to run, after one exact evaluation, against one rank: how much it is
  depends on the model and the steps, which are few and far between here. [Benchmarks](benchmarks.md) has that of a
  trained model's pictures.
- **Samplers**: every sampler of ComfyUI, 3 steps at cfg 3, a latent of 30 x 20 (150 tokens, which no degree divides
  evenly; for PixArt 30 x 38, 285 tokens). Schedulers take turns, so that each one is met. Runs are whole on the
  workers where the sampler allows it; "step by step" leaves the loop to ComfyUI. The limit is 1e-4. `heun` with
  `ddim_uniform` stands out because it divides by a last sigma of 0.0006: noise of 1e-7 on the outputs of ComfyUI's own
  model moves its result by 4e-5 (SD3) and 5e-4 (Flux).

The tests hold more (`tests/test_matrix.py`): every product of degrees that there is on 1, 2, 3, 4 and 8 ranks; exact
ones to 1e-5, and the approximation of the others, in fp64, to its emulation in one process, bit for bit.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--comfyui", nargs="*", help="ComfyUI checkouts (default: those found)")
    parser.add_argument("--samplers", nargs="*", help="only these samplers, and no modes")
    help_ = "only N ranks against one, which needs no ComfyUI (without numbers: 2 3 4 8)"
    parser.add_argument("--ranks", nargs="*", type=int, metavar="N", help=help_)
    parser.add_argument("--out", help="write the tables to this file too")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a result is beyond its limit."""
    found = [] if args.ranks is not None else [Path(entry) for entry in args.comfyui or ()] or checkouts()
    if not found and args.ranks is None:
        raise ValueError("no ComfyUI found; name a checkout with --comfyui, set COMFYUI_DIR, or give --ranks")
    numbers = () if args.samplers else args.ranks or NUM_RANKS
    one_rank = [result for number in numbers for result in against_one_rank(number)]
    modes, samplers = {"1 rank": one_rank}, {}
    for checkout in found:
        name = f"ComfyUI {version_of(checkout)}"
        modes[name] = list(inside(checkout, ["--modes", *map(str, numbers)])) if numbers else []
        samplers[name] = list(inside(checkout, ["--samplers", *args.samplers] if args.samplers else []))
    text = INTRODUCTION
    if one_rank:
        text += f"\n## Modes\n\n{mode_table(modes)}\n## Drift\n\n{drift_table(one_rank)}"
    text += "".join(f"\n## Samplers, {name}\n\n{sampler_table(results)}" for name, results in samplers.items())
    sys.stdout.write(text)
    if args.out:
        Path(args.out).write_text(text)
    in_host = [result for name in samplers for result in (*modes[name], *samplers[name])]
    return int(not (within(ONE_RANK_LIMIT, one_rank) and within(HOST_LIMIT, in_host)))


def within(limit: float, results: Iterable[Result]) -> bool:
    return all(result["error"] <= limit for result in results)


def inside(checkout: Path, arguments: list[str]) -> Iterator[Result]:
    """What `nodes/parity` prints in a ComfyUI checkout. Raises ValueError when it fails."""
    measure = PACKAGES["comfy_xdit_nodes"] / "parity" / "__main__.py"
    command = [python_of(checkout), str(measure), "--comfyui", str(checkout), *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise ValueError(f"parity in {checkout} ended with status {process.returncode}; its own words are above")
