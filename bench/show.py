"""A benchmark's result for people, or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

Result = dict[str, Any]
"""compared: a sentence; rows: dicts with the same keys; what else holds for the whole run, also further such rows."""


def json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def show(result: Result, *, as_json: bool) -> int:
    """Write the result to standard output; returns the exit status 0."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if as_json else table(result))
    return 0


def table(result: Result) -> str:
    """The comparison, its rows in columns, and its other figures, a line each; further rows below."""
    others = {key: value for key, value in result.items() if key not in ("compared", "rows")}
    further = {key: value for key, value in others.items() if isinstance(value, list)}
    lines = [result["compared"], "", *_columns(result["rows"])]
    lines += [f"{key}: {_cell(value)}" for key, value in others.items() if key not in further]
    for key, rows in further.items():
        lines += [f"{key}:", *_columns(rows)] if rows else []
    return "\n".join(lines) + "\n"


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return [*lines, ""]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
