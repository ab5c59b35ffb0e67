"""`comfy-xdit bench native`: ComfyUI's own classes on one rank and on several, against ComfyUI's own run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .hosts import checkouts
from .parity import inside
from .show import json_argument, show


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--comfyui", help="a ComfyUI checkout (default: the first that is found)")
    parser.add_argument("--family", choices=("wan", "qwen-image"), default="wan")
    parser.add_argument("--tokens", type=int, default=4096, help="of the video or picture (default: 4096)")
    help_ = "degrees of a pool, as ulysses=2,cfg=1; may be given again (default: ulysses=2, ring=2 and pipe=2)"
    parser.add_argument("--degrees", action="append", metavar="AXIS=N", help=help_)
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each (default: 3)")


def run(args: argparse.Namespace) -> int:
    found = [Path(args.comfyui)] if args.comfyui else checkouts()
    if not found:
        raise ValueError("no ComfyUI found; name a checkout with --comfyui, or set COMFYUI_DIR")
    degrees = [_degrees(text) for text in args.degrees or ("ulysses=2", "ring=2", "pipe=2")]
    told = json.dumps({"family": args.family, "tokens": args.tokens, "degrees": degrees, "num_turns": args.turns})
    (result,) = inside(found[0], ["--native", told])
    return show(result, as_json=args.json)


def _degrees(text: str) -> dict[str, int]:
    found = {}
    for part in text.split(","):
        axis, _, degree = part.partition("=")
        if not degree.isdigit():
            raise ValueError(f"{part!r} is no degree; write it as ulysses=2")
        found[axis] = int(degree)
    return found
