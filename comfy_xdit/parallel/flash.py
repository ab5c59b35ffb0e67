"""flash-attn 3 and 2, if they are installed and a trial on the device shows that they work there."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from comfy_xdit.quoted import quoted

from . import flash_try

log = logging.getLogger("comfy_xdit")

MODULES = {"flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}

TRY_TIMEOUT_S = 120.0
"""For the imports, the device's start and a few small kernels."""


# As the directory of a script it would hide packages of the same names as its neighbours.
RUN = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@functools.cache
def is_installed(name: str) -> bool:
    """Whether a package of this name is there; it is not imported."""
    try:
        return importlib.util.find_spec(MODULES[name]) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def usable(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """flash-attn's function; None where it isn't installed or does not work.

    The first question for a device and a dtype takes seconds, and a no leaves a line in the log.
    """
    if not is_installed(name):
        return None
    fault = _fault(MODULES[name], str(device), str(dtype).removeprefix("torch."))
    if not fault:
        kernel: Callable[..., Any] = importlib.import_module(MODULES[name]).flash_attn_func
        return kernel
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    log.warning("%s is installed, but torch's own kernels are used for %s on %s: %s", name, dtype, kind, fault)
    return None


def _fault(module: str, device: str, dtype: str) -> str:
    """What is wrong with the package; "" for nothing."""
    # A process of its own: a kernel that is missing may end it, and leaves the device's state unusable in any case.
    command = [sys.executable, "-c", RUN, flash_try.__file__, module, device, dtype]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it gave no answer in {TRY_TIMEOUT_S:.0f} s"
    if done.returncode < 0:
        return f"it ended its process by signal {-done.returncode}"
    if done.returncode:
        return f"it ended its process with status {done.returncode}"
    last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
    return "" if last == flash_try.GOOD else quoted(last)
