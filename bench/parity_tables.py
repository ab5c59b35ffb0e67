"""Results of `comfy-xdit parity` as tables in Markdown."""

from __future__ import annotations

import math
from typing import Any

Result = dict[str, Any]
"""As `matrix.against_one_rank` and, in ComfyUI, `nodes/parity/measure.py` give them."""


def mode_table(columns: dict[str, list[Result]]) -> str:
    """Markdown: a row for each mode, for each family a column of each of `columns`, which are by what it is against."""
    errors: dict[tuple[str, tuple[str, str]], list[float]] = {}
    for against, results in columns.items():
        for result in results:
            place = (result.get("mode") or result["case"], (result["kind"], against))
            errors.setdefault(place, []).append(result["error"])
    ranks = {result["mode"]: result["ranks"] for result in columns["1 rank"]}
    kinds = list(dict.fromkeys(result["kind"] for result in columns["1 rank"]))
    places = [(kind, against) for kind in kinds for against in columns]
    rows = [[str(n), mode, *(_worst(errors.get((mode, place), [])) for place in places)] for mode, n in ranks.items()]
    worst = [_worst([e for (_, at), found in errors.items() if at == place for e in found]) for place in places]
    heads = ["ranks", "mode", *(f"{kind}, {against}" for kind, against in places)]
    return markdown([heads, *rows, ["", "**worst**", *worst]])


def drift_table(results: list[Result]) -> str:
    """Markdown: a row for each approximate mode, for each family its largest difference and its PSNR."""
    approximate = [result for result in results if result["drift"] is not None]
    found = {(r["mode"], r["kind"]): f"{r['drift']:.0e}, {r['psnr_db']:.1f} dB" for r in approximate}
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    ranks = {result["mode"]: result["ranks"] for result in approximate}
    rows = [[str(number), mode, *(found.get((mode, kind), "-") for kind in kinds)] for mode, number in ranks.items()]
    return markdown([["ranks", "mode", *kinds], *rows])


def sampler_table(results: list[Result]) -> str:
    """Markdown: a row for each sampler, a column for each model and case."""
    places = list(dict.fromkeys((result["kind"], result["case"]) for result in results))
    errors = {(r["sampler"], (r["kind"], r["case"])): r["error"] for r in results}
    schedulers = {result["sampler"]: result["scheduler"] for result in results}
    rows = [
        [sampler, scheduler, *(_worst([errors[sampler, place]]) for place in places)]
        for sampler, scheduler in schedulers.items()
    ]
    worst = [_worst([errors[sampler, place] for sampler in schedulers]) for place in places]
    heads = ["sampler", "scheduler", *(f"{kind} {case}" for kind, case in places)]
    return markdown([heads, *rows, ["**worst**", "", *worst]])


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _worst(errors: list[float]) -> str:
    """One that is no number is worse than any."""
    if not errors:
        return "-"
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    return f"{worst:.0e}" if worst else "0"
