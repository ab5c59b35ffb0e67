"""Peak memory of a rank while it decodes and encodes, on several numbers of ranks, and the results' difference."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.mount import BOOT
from comfy_xdit.vae import VAEConfig

from .show import json_argument, show
from .vae_checkpoint import write_vae

TIMEOUT_S = 1800.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to compare")
    parser.add_argument("--size", type=int, default=256, help="height and width of the image (default: 256)")
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[128, 256, 512, 512],
        help="channels of the VAE's stages (default: those of SD, SDXL, SD3 and Flux)",
    )


def vae(*, ranks: Sequence[int], size: int, widths: Sequence[int]) -> dict[str, Any]:
    """A row for each number of ranks and each of decode and encode.

    peak_bytes: tensors beside the weights on the rank that held most; resident_bytes: growth of its process
    (CPU only); difference: greatest against one rank (the first of `--ranks`); seconds: of the slowest rank.
    """
    config = VAEConfig(
        latent_channels=16,
        block_out_channels=tuple(widths),
        layers_per_block=2,
        quant_conv=False,
        post_quant_conv=False,
        attention=True,
    )
    if size % config.ratio:
        raise ValueError(f"--size {size} is no multiple of {config.ratio}; use one, such as 256")
    with tempfile.TemporaryDirectory(prefix="comfy-xdit-bench-") as name:
        folder = Path(name)
        write_vae(folder / "vae.safetensors", config)
        rows = size // config.ratio
        cases = [
            ("decode", torch.randn(1, config.latent_channels, rows, rows)),
            ("encode", torch.rand(1, 3, size, size) * 2 - 1),
        ]
        torch.save(cases, folder / "cases.pt")
        results = {num_ranks: run_ranks(folder, num_ranks) for num_ranks in ranks}
    return {
        "compared": f"an image of {size} x {size} pixels in float32, VAE widths {list(widths)}",
        "rows": [row for at, (kind, _) in enumerate(cases) for row in _rows(kind, at, results)],
    }


def _rows(kind: str, at: int, results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    first = next(iter(results.values()))["outputs"][at]
    return [
        {
            "work": kind,
            "ranks": num_ranks,
            "peak_bytes": max(rank[at]["peak_bytes"] for rank in result["ranks"]),
            "resident_bytes": max(rank[at]["resident_bytes"] for rank in result["ranks"]),
            "seconds": max(rank[at]["seconds"] for rank in result["ranks"]),
            "difference": (result["outputs"][at] - first).abs().max().item(),
        }
        for num_ranks, result in results.items()
    ]


def run_ranks(folder: Path, num_ranks: int) -> dict[str, Any]:
    """What `vae_rank` writes, and "log": what rank 0 said. GPUs are used when there is one for each rank.

    Raises RuntimeError with the ranks' output when one of them fails.
    """
    gpus = torch.cuda.device_count() >= num_ranks
    ranks = []
    for rank in range(num_ranks):
        device = f"cuda:{rank}" if gpus else "cpu"
        command = [sys.executable, str(BOOT), "comfy_xdit_bench.vae_rank", str(rank), str(num_ranks), device]
        ranks.append(
            subprocess.Popen(
                [*command, str(folder)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    failed = [output for process, output in zip(ranks, outputs, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {num_ranks} ranks failed: {failed[0][-2000:]}")
    return torch.load(folder / f"results-{num_ranks}.pt") | {"log": outputs[0]}


def run(args: argparse.Namespace) -> int:
    return show(vae(ranks=args.ranks, size=args.size, widths=args.widths), as_json=args.json)
