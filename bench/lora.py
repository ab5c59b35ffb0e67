"""`comfy-xdit bench lora`: the time to switch a LoRA, against ComfyUI's own on the same weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from .hosts import checkouts
from .parity import inside
from .show import json_argument, show


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--comfyui", help="a ComfyUI checkout (default: the first that is found)")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each (default: 5)")


def run(args: argparse.Namespace) -> int:
    found = [Path(args.comfyui)] if args.comfyui else checkouts()
    if not found:
        raise ValueError("no ComfyUI found; name a checkout with --comfyui, or set COMFYUI_DIR")
    (result,) = inside(found[0], ["--lora", str(args.ranks), str(args.turns)])
    return show(result, as_json=args.json)
