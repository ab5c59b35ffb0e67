"""`comfy-xdit selftest`: whether the plans of ComfyUI's own models hold for the ComfyUI at hand."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import Any

import torch

from comfy_xdit.errors import InputError
from comfy_xdit.messages import UseComfy
from comfy_xdit.native.boot import boot, kitchen_version, sources_of, version_of
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.proof import RESULTS, finding_key, keep
from comfy_xdit.native.selftest import selftest, verdict
from comfy_xdit.native.subject import Config, from_text
from comfy_xdit.native.subjects import SUBJECTS
from comfy_xdit.pool.folder import own_folder

TORCHS_ATTENTION = {"use_pytorch_cross_attention": True}
"""What ComfyUI chooses by itself on a GPU."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--comfyui", required=True, metavar="DIR", help="folder of ComfyUI; run it with its Python")
    parser.add_argument("--family", choices=FAMILIES, help="only this one (default: all that this ComfyUI has)")
    parser.add_argument("--kind", help="only this class of a --family's configurations, with --config")
    parser.add_argument("--config", metavar="DICT", help="a file's configuration, tried with the self-test's sizes")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")


def run(args: argparse.Namespace) -> int:
    """Test and print; 1 when a family is refused. Raises InputError for a folder that is no ComfyUI."""
    folder = comfyui_folder(args.comfyui)
    real = _real(args)
    import_comfy(folder)
    torch.set_num_threads(1)
    found = []
    for name in [args.family] if args.family else FAMILIES:
        entry = _tried(name, folder, real)
        if entry["calls"] or args.family:
            found.append(entry)
            if not args.json:
                sys.stdout.write(_line(entry))
                sys.stdout.flush()
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return int(any(entry["refused"] for entry in found))


def _real(args: argparse.Namespace) -> dict[str, Config] | None:
    """Kind → the configuration to try. Raises InputError for half of what says it."""
    if not args.kind and not args.config:
        return None
    if not (args.family and args.kind and args.config) or args.kind not in FAMILIES[args.family].kinds:
        raise InputError("--config needs --kind, one of a --family's, whose configuration it is")
    return {args.kind: from_text(args.config)}


def comfyui_folder(named: str) -> str:
    """Raises InputError for a folder that is no ComfyUI."""
    folder = os.path.realpath(named)
    if not os.path.isfile(os.path.join(folder, "comfy", "model_detection.py")):
        raise InputError("--comfyui names a folder without a ComfyUI in it; give the one that has ComfyUI's main.py")
    return folder


def import_comfy(folder: str) -> None:
    """Import its classes, for a CPU."""
    logging.getLogger().setLevel(logging.ERROR)
    boot(
        UseComfy(
            folder=folder,
            version=version_of(folder),
            sources=sources_of(folder),
            kitchen=kitchen_version(),
            options=TORCHS_ATTENTION,
        ),
        torch.device("cpu"),
    )


def _tried(name: str, folder: str, real: dict[str, Config] | None) -> dict[str, Any]:
    family, version = FAMILIES[name], version_of(folder)
    outcomes = selftest(family, SUBJECTS[name], real=real)
    refused = verdict(family, outcomes, version)
    if not outcomes:
        refused = f"ComfyUI {version} has no {family.title}; use a newer one"
    keep(own_folder() / RESULTS, finding_key(family, folder, real), refused)
    worst = max((outcome.error for outcome in outcomes), default=0.0)
    return {
        "family": name,
        "comfyui": version,
        "calls": len(outcomes),
        "worst": worst if outcomes and worst != float("inf") else None,
        "refused": refused,
        "failed": [f"{outcome.call}: {outcome.why or outcome.error}" for outcome in outcomes if not outcome.holds],
    }


def _line(entry: dict[str, Any]) -> str:
    if entry["refused"]:
        return f"{entry['family']:<18} refused: {entry['refused']}\n" + "".join(f"    {x}\n" for x in entry["failed"])
    return f"{entry['family']:<18} holds: {entry['calls']} calls, worst difference {entry['worst']:.1e}\n"
