"""`comfy-xdit demo`: pictures from a tiny Flux, on one rank and on all of them, and whether they agree."""

from __future__ import annotations

import argparse
from pathlib import Path

from comfy_xdit.demo.run import run

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--devices", default="auto", help="auto, cuda, cuda:0,1 or cpu:2 (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=20, help="steps per picture (default: 20)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each rank did as a Chrome trace")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="do it through this ComfyUI checkout")
    parser.add_argument("--comfyui-python", metavar="FILE", help="the Python of that ComfyUI")
