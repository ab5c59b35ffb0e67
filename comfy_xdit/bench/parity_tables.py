"""Results of `comfy-xdit parity` as tables in Markdown."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
"""As `matrix.against_one_rank` and, in ComfyUI, `nodes/parity/measure.py` give them."""


def mode_table(columns: dict[str, list[Result]]) -> str:
    """Markdown: a row for each mode, for each family a column of each of `columns`, which are by what it is against."""
    errors: dict[tuple[str, tuple[str, str]], float] = {}
    for against, results in columns.items():
        for result in results:
            place = (result.get("mode") or result["case"], (result["kind"], against))
            errors[place] = max(errors.get(place, 0.0), result["error"])
    ranks = {result["mode"]: result["ranks"] for result in columns["1 rank"]}
    kinds = list(dict.fromkeys(result["kind"] for result in columns["1 rank"]))
    places = [(kind, against) for kind in kinds for against in columns]
    rows = [[str(n), mode, *(_small(errors.get((mode, place))) for place in places)] for mode, n in ranks.items()]
    worst = [_small(max((e for (_, at), e in errors.items() if at == place), default=None)) for place in places]
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
        [sampler, scheduler, *(_small(errors[sampler, place]) for place in places)]
        for sampler, scheduler in schedulers.items()
    ]
    worst = [_small(max(errors[sampler, place] for sampler in schedulers)) for place in places]
    heads = ["sampler", "scheduler", *(f"{kind} {case}" for kind, case in places)]
    return markdown([heads, *rows, ["**worst**", "", *worst]])


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _small(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.0e}" if error else "0"
