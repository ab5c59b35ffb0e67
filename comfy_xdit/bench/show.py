"""A benchmark's result for people, or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

Result = dict[str, Any]
"""compared: a sentence; rows: dicts with the same keys; what else holds for the whole run."""


def json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def show(result: Result, *, as_json: bool) -> int:
    """Write the result to standard output; returns the exit status 0."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if as_json else table(result))
    return 0


def table(result: Result) -> str:
    """The comparison, its rows in columns, and its other figures, a line each."""
    lines = [result["compared"], ""]
    rows = result["rows"]
    if rows:
        cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        lines.append("")
    lines += [f"{key}: {_cell(value)}" for key, value in result.items() if key not in ("compared", "rows")]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
