"""`comfy-xdit check --templates DIR`: which of ComfyUI's own workflow templates a pool runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

from comfy_xdit.errors import InputError
from comfy_xdit.templates.graph import templates
from comfy_xdit.templates.verdicts import Verdict, is_sampling, share, verdict

PACKAGE = "comfyui_workflow_templates_json"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    help_ = "folder with ComfyUI's templates and their index.json (default: the package that this Python has)"
    parser.add_argument("--templates", metavar="DIR", nargs="?", const="", required=True, help=help_)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print a line for each template that samples with a local model, and the share by usage. Raises InputError."""
    folder = Path(args.templates) if args.templates else _installed()
    found = [verdict(template) for template in templates(folder) if is_sampling(template)]
    if args.json:
        sys.stdout.write(json.dumps(_table(found), indent=2) + "\n")
        return 0
    for one in found:
        sys.stdout.write(_line(one))
    num_running = sum(one.runs for one in found)
    sys.stdout.write(f"{num_running} of {len(found)} templates run; {share(found):.1%} of their usage\n")
    return 0


def _installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"this Python has no {PACKAGE}; install it, or name a folder with --templates DIR")
    return Path(next(iter(spec.submodule_search_locations))) / "templates"


def _table(found: list[Verdict]) -> dict[str, object]:
    rows = [
        {**dataclasses.asdict(one.template), "families": one.families, "runs": one.runs, "why": one.why}
        for one in found
    ]
    return {
        "compared": "templates that sample with a local model, by names of files and nodes; nothing is loaded",
        "share_of_usage": share(found),
        "num_running": sum(one.runs for one in found),
        "rows": rows,
    }


def _line(one: Verdict) -> str:
    what = f"runs ({', '.join(one.families)})" if one.runs else f"not: {one.why}"
    return f"{one.template.usage:>7} {one.template.name}: {what}\n"
