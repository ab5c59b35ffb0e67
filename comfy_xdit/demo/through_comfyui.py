"""`comfy-xdit demo --comfyui DIR`: the demo's pictures made by ComfyUI, with its own nodes and with ours."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from comfy_xdit.pool.devices import num_cuda_devices
from comfy_xdit.pool.stop import stop

from .comfyui_server import Server, serve
from .pictures import contact_sheet
from .words import PROMPTS

WORKFLOW = Path(__file__).resolve().parent / "workflow.json"
STOCK = {"XDiTLoadDiffusionModel": "UNETLoader", "XDiTKSampler": "KSampler", "XDiTVAEDecode": "VAEDecode"}
NUM_PROMPTS = 6
TOLERANCE = 1
"""Of 255, in any pixel."""


def run(args: argparse.Namespace) -> int:
    """Make pictures both ways; the exit status is 1 when they differ."""
    workflow = json.loads(WORKFLOW.read_text())
    workflow["pool"]["inputs"]["devices"] = args.devices
    workflow["sampler"]["inputs"]["steps"] = args.steps
    folder = args.out.resolve() / "comfyui"
    rows: dict[str, list[Image.Image]] = {}
    seconds: dict[str, float] = {}
    sys.stdout.write(f"starting ComfyUI from {args.comfyui}\n")
    sys.stdout.flush()
    try:
        cpu = not num_cuda_devices()
        with serve(args.comfyui.resolve(), args.comfyui_python, folder, cpu=cpu) as server:
            for ours in (False, True):
                for lora in (False, True):
                    title = f"{'xDiT' if ours else 'ComfyUI'}{', LoRA' if lora else ''}"
                    begin = time.perf_counter()
                    rows[title] = _pictures(server, variant(workflow, ours=ours, lora=lora))
                    seconds[title] = time.perf_counter() - begin
    finally:
        with contextlib.suppress(ConnectionError):
            stop(workflow["pool"]["inputs"]["name"])
    differences = {
        title: max(_difference(a, b) for a, b in zip(rows[f"xDiT{title}"], rows[f"ComfyUI{title}"], strict=True))
        for title in ("", ", LoRA")
    }
    contact_sheet(list(rows.values()), list(PROMPTS[:NUM_PROMPTS]), list(rows)).save(args.out / "comfyui-sheet.png")
    sys.stdout.write(_table(seconds, differences))
    sys.stdout.write(f"Contact sheet: {args.out.resolve() / 'comfyui-sheet.png'}; pictures: {folder / 'output'}\n")
    return 0 if max(differences.values()) <= TOLERANCE else 1


def variant(workflow: dict[str, Any], *, ours: bool, lora: bool) -> dict[str, Any]:
    """The workflow with ComfyUI's own nodes in place of ours, or without the LoRA."""
    prompt = copy.deepcopy(workflow)
    if not lora:
        prompt["sampler"]["inputs"]["model"] = prompt.pop("lora")["inputs"]["model"]
    if not ours:
        del prompt["pool"]
        for node in prompt.values():
            node["class_type"] = STOCK.get(node["class_type"], node["class_type"])
            node["inputs"].pop("pool", None)
    return prompt


def _pictures(server: Server, prompt: dict[str, Any]) -> list[Image.Image]:
    pictures = []
    for text in PROMPTS[:NUM_PROMPTS]:
        prompt["positive"]["inputs"]["prompt"] = text
        (file,) = server.run(prompt)
        pictures.append(Image.open(file).convert("RGB"))
    return pictures


def _difference(a: Image.Image, b: Image.Image) -> int:
    return int(numpy.abs(numpy.asarray(a, dtype=int) - numpy.asarray(b, dtype=int)).max())


def _table(seconds: dict[str, float], differences: dict[str, int]) -> str:
    lines = [f"\n{NUM_PROMPTS} pictures in each row", f"{'through':<20}{'seconds':>10}{'max difference of 255':>24}"]
    for title, value in seconds.items():
        drift = str(differences[title.removeprefix("xDiT")]) if title.startswith("xDiT") else ""
        lines.append(f"{title:<20}{value:>10.1f}{drift:>24}")
    return "\n".join(lines) + "\n"
