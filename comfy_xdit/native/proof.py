"""Whether a family holds on a ComfyUI: what an earlier self-test found, or what one finds now.

A finding holds for one version of everything that it depends on: ComfyUI's sources, torch, the family's plan, our
engine with what it is tried on, and the configuration of the file but for its sizes. The self-test is another process:
it imports ComfyUI for a CPU, whatever this one has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from comfy_xdit import parallel

from .boot import hash_of_sources, sources_of
from .family import ComfyFamily
from .subject import Config, as_text, cases
from .subjects import SUBJECTS

log = logging.getLogger("comfy_xdit")

RESULTS = "selftest.json"
"""The file of findings, in the folder of all pools."""

TIMEOUT_S = 300.0
"""A self-test takes seconds; so long on a machine that is busy."""

POLL_S = 0.1
TELL_S = 5.0
"""How often the log says that a self-test still runs."""


def why_refused(
    family: ComfyFamily, real: dict[str, Config], comfyui: str, results: Path, poll: Callable[[], object]
) -> str:
    """The sentence that refuses a file of the family with the ComfyUI in the folder `comfyui`; "" where it holds.

    real: kind → the file's configuration, as ComfyUI detects it. results: the file in which findings are kept.
    poll: called ten times a second while a self-test runs; what it raises ends the test, and is raised.
    Raises InputError where the configuration has what can't be said. May take as long as a self-test: not for a thread
    that serves.
    """
    key = finding_key(family, comfyui, real)
    if (known := findings(results).get(key)) is not None:
        return known
    ((kind, config),) = real.items()
    command = [sys.executable, "-m", "comfy_xdit", "selftest", "--comfyui", comfyui, "--family", family.name]
    command += ["--kind", kind, "--config", as_text(config), "--json"]
    log.info("%s: trying its plan on this ComfyUI, once, some seconds", family.title)
    try:
        (answer,) = json.loads(_printed(command, family.title, poll))
        return str(answer["refused"])
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        # Not kept: it says nothing of the family.
        return (
            f"{family.title} is not run on several GPUs: its self-test could not be run ({type(error).__name__}); "
            "`comfy-xdit selftest` shows why"
        )


def _printed(command: list[str], title: str, poll: Callable[[], object]) -> str:
    """What a command prints. Raises TimeoutExpired, and what `poll` raises; the command has ended then, too."""
    # The package need not be installed.
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    begin, told_s = time.monotonic(), 0.0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
        try:
            while True:
                try:
                    return str(process.communicate(timeout=POLL_S)[0])
                except subprocess.TimeoutExpired:
                    taken_s = time.monotonic() - begin
                    if taken_s > TIMEOUT_S:
                        raise
                if taken_s > told_s + TELL_S:
                    told_s = taken_s
                    log.info("%s: its self-test runs for %.0f s, %.0f at most", title, taken_s, TIMEOUT_S)
                poll()
        finally:
            process.kill()


def finding_key(family: ComfyFamily, comfyui: str, real: dict[str, Config] | None = None) -> str:
    """Of all that a finding depends on; real: as of `cases`."""
    ours = hash_of_sources(Path(__file__).parent, Path(parallel.__file__).parent)
    tried = [(subject.kind, as_text(config)) for subject, config in cases(SUBJECTS[family.name], real)]
    parts = (sources_of(comfyui), torch.__version__, family.name, repr(family.plan), ours, repr(tried))
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
