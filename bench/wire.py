"""What each method sends: measured bytes beside our formula and beside the table of xDiT's documentation."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from comfy_xdit.cost.arithmetic import Network, read_network
from comfy_xdit.cost.document import TABLE, bytes_sent
from comfy_xdit.cost.job import sent_in_job
from comfy_xdit.cost.work import Work
from comfy_xdit.messages import Denoise, LoadModel, Result, Sample
from comfy_xdit.parallel.spec import APPROXIMATE, AXES, ParallelSpec, check
from comfy_xdit.pool.client import Pool

from .bench_pool import bench_pool
from .checkpoint import FluxSize, random_call, write_flux
from .pixart import PixArtSize, pixart_call, write_pixart
from .program import whole_run
from .sd3 import SD3Size, sd3_call, write_sd3
from .show import json_argument, show

MODEL = "wire"
NUM_EVALUATIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and a call of it whose tokens and text no degree divides evenly, so that a wrong rounding shows.

    write: makes the model's file. call: rows of the batch → arguments of ComfyUI's model.
    """

    write: Callable[[Path], Path]
    call: Callable[[int], dict[str, Tensor]]


FLUX = FluxSize(hidden=96, head_dim=16, double_blocks=2, single_blocks=3)
SD3 = SD3Size(heads=6, blocks=5)
PIXART = PixArtSize(heads=6, blocks=5)

SUBJECTS = {
    "flux": Subject(
        write=lambda path: write_flux(path, FLUX),
        call=lambda batch: random_call(FLUX, tokens=35, text_tokens=13, batch=batch),
    ),
    "sd3": Subject(
        write=lambda path: write_sd3(path, SD3),
        call=lambda batch: sd3_call(SD3, rows=5, columns=7, text_tokens=13, batch=batch),
    ),
    "pixart": Subject(
        write=lambda path: write_pixart(path, PIXART),
        call=lambda batch: pixart_call(PIXART, rows=5, columns=29, text_tokens=13, batch=batch),
    ),
}
"""By the family's name."""


def wire(*, num_ranks: int = 2, family: str = "flux") -> dict[str, Any]:
    """A row for each method on `num_ranks` ranks, and for products of two where there are four or more."""
    with tempfile.TemporaryDirectory() as folder, bench_pool(num_ranks) as pool:
        path = str(SUBJECTS[family].write(Path(folder) / "wire.safetensors"))
        network = read_network(path)
        specs = [spec for spec in candidates(num_ranks) if not check(spec, num_ranks=num_ranks, shape=network.shape)]
        rows = [_row(pool, path, network, family, spec) for spec in specs]
    return {
        "compared": (
            f"bytes that the busiest of {num_ranks} ranks sends, in one evaluation or in {NUM_EVALUATIONS} of a "
            f"sampling run, of a {network.title} of {network.hidden} x {network.num_attentions} in fp32, with tokens "
            "that no degree divides: measured, our formula, and the document's"
        ),
        "rows": rows,
    }


def candidates(num_ranks: int) -> list[ParallelSpec]:
    """Every method alone, and products of two."""
    alone = [ParallelSpec(**{axis: num_ranks}) for axis in AXES]
    half, rest = divmod(num_ranks, 2)
    if rest or half < 2:
        return alone
    pairs = [(one, two) for i, one in enumerate(AXES) for two in AXES[i + 1 :]]
    return alone + [ParallelSpec(**{one: 2, two: half}) for one, two in pairs]


def _row(pool: Pool, path: str, network: Network, family: str, spec: ParallelSpec) -> dict[str, Any]:
    chunks = spec.cfg
    call = SUBJECTS[family].call(chunks * spec.dp)
    (height, width), text_tokens = call["x"].shape[-2:], call["context"].shape[1]
    work = Work(latent=(height, width), text_tokens=text_tokens, images=spec.dp, chunks=chunks, element_bytes=4)
    load = LoadModel(
        model=MODEL,
        path=path,
        prefix="",
        family=family,
        storage_dtype="float32",
        compute_dtype="float32",
        spec=spec,
    )
    message: Denoise | Sample
    if any(getattr(spec, axis) > 1 for axis in APPROXIMATE):
        # What they send depends on the evaluation before, so it takes a run.
        work = dataclasses.replace(work, num_evaluations=NUM_EVALUATIONS)
        message = whole_run(MODEL, call, spec, num_evaluations=NUM_EVALUATIONS, chunks=chunks)
    else:
        work = dataclasses.replace(work, num_evaluations=1)
        message = Denoise(model=MODEL, patches_id="", spec=spec, calls=[call], chunks=[chunks])
    with pool.lease():
        pool.call(load)
        results = pool.call_all(message)
    return compare(results, network, work, spec)


def compare(results: list[Result], network: Network, work: Work, spec: ParallelSpec) -> dict[str, Any]:
    """Measured and predicted bytes of each rank; the row shows the busiest."""
    measured = [Counter(result.report["bytes_sent"]) for result in results]
    ours = [sent_in_job(network, work, spec, rank) for rank in range(spec.num_ranks)]
    used = [axis for axis, degree in spec.degrees.items() if degree > 1]
    document = None
    if len(used) == 1 and used[0] in TABLE:
        tokens = sum(count for stream, count in work.tokens(network).items() if stream in network.cut)
        document = bytes_sent(
            used[0],
            tokens=tokens * work.rows * work.num_evaluations,
            hidden=network.hidden,
            layers=network.num_attentions,
            degree=spec.num_ranks,
            element_bytes=work.element_bytes,
        )
    busiest = max(counter.total() for counter in measured)
    return {
        "method": str(spec).replace("\u00d7", "x"),
        "evaluations": work.num_evaluations,
        "measured_bytes": busiest,
        "formula_bytes": max(counter.total() for counter in ours),
        "every_rank_equal": measured == ours,
        "document_bytes": document,
        "measured_over_document": busiest / document if document else None,
        "collectives": " ".join(sorted(measured[0])),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--family", choices=SUBJECTS, default="flux", help="of the model (default: flux)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a rank sent other bytes than the formula says."""
    result = wire(num_ranks=args.ranks, family=args.family)
    show(result, as_json=args.json)
    return int(not all(row["every_rank_equal"] for row in result["rows"]))
