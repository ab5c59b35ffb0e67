"""Whether a family holds on a ComfyUI: what an earlier self-test found, or what one finds now.

A finding holds for one version of everything that it depends on: ComfyUI's sources, torch, the family's plan, and our
engine with what it is tried on. The self-test is another process: it imports ComfyUI for a CPU, whatever this one has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from comfy_xdit import parallel

from .boot import hash_of_sources, sources_of
from .family import ComfyFamily

RESULTS = "selftest.json"
"""The file of findings, in the folder of all pools."""

TIMEOUT_S = 300.0
"""A self-test takes seconds; so long on a machine that is busy."""


def why_refused(family: ComfyFamily, comfyui: str, results: Path) -> str:
    """The sentence that refuses the family with the ComfyUI in the folder `comfyui`; "" where it holds.

    results: the file in which findings are kept. May take as long as a self-test: not for a thread that serves.
    """
    key = finding_key(family, comfyui)
    if (known := findings(results).get(key)) is not None:
        return known
    command = [sys.executable, "-m", "comfy_xdit", "selftest", "--comfyui", comfyui, "--family", family.name, "--json"]
    # The package need not be installed.
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        (answer,) = json.loads(done.stdout)
        return str(answer["refused"])
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        # Not kept: it says nothing of the family.
        return (
            f"{family.title} is not run on several GPUs: its self-test could not be run ({type(error).__name__}); "
            "`comfy-xdit selftest` shows why"
        )


def finding_key(family: ComfyFamily, comfyui: str) -> str:
    """Of all that a finding depends on."""
    ours = hash_of_sources(Path(__file__).parent, Path(parallel.__file__).parent)
    parts = (sources_of(comfyui), torch.__version__, family.name, repr(family.plan), ours)
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def findings(results: Path) -> dict[str, str]:
    """Key → why the family was refused, "" where it holds; none where there is no file that can be read."""
    try:
        found = json.loads(results.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(results: Path, key: str, why: str) -> None:
    """Add a finding. On a disk that can't be written nothing is kept: the next one finds it anew."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=results.parent, delete=False, encoding="utf-8") as file:
            json.dump({**findings(results), key: why}, file, indent=1)
        os.replace(file.name, results)
