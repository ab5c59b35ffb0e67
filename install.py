"""Check the environment, or run the demo or the tests in a virtual environment of their own.

    python install.py            what ComfyUI-Manager runs: looks, explains, changes nothing
    python install.py --demo     makes .venv-demo in this folder and runs the demo there
    python install.py --test     makes .venv-test in this folder and runs the tests there

What follows --demo or --test is handed on, to `comfy-xdit demo` or to pytest. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 10)
TORCH = "2.13.0"
"""For our own environments only; inside ComfyUI its torch is left as it is."""
LEAST_SHM_BYTES = 256 << 20
KERNELS = {"flash_attn_interface": "flash-attn 3", "flash_attn": "flash-attn 2"}
"""Module → what people call it; those that comfy_xdit/parallel/kernels.py uses."""


def main(arguments: list[str]) -> int:
    """The exit status: always 0 without arguments, since ComfyUI must start whatever we find."""
    if not arguments:
        say("comfy-xdit, environment:")
        for sentence in findings():
            say(f"  {sentence}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in ("--demo", "--test"):
        say(__doc__ or "")
        return 0 if command in ("-h", "--help") else 2
    try:
        python = environment(command.removeprefix("--"))
    except InstallError as error:
        say(f"install.py: {error}")
        return 1
    run = ["-m", "comfy_xdit", "demo"] if command == "--demo" else ["-m", "pytest"]
    return subprocess.call([str(python), *run, *rest], cwd=ROOT)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class InstallError(Exception):
    """An environment cannot be made; the message is a sentence for the user."""


# Our own environments


def environment(name: str) -> Path:
    """The Python of `.venv-<name>`, made or brought up to date when pyproject.toml changed.

    Raises InstallError.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise InstallError(f"Python {platform.python_version()} is too old; use 3.10 or newer")
    folder = ROOT / f".venv-{name}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed"
    wanted = fingerprint()
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"making {folder}")
    make = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if make.returncode:
        said = (make.stderr or make.stdout).strip().splitlines() or ["no reason given"]
        raise InstallError(
            f"this Python makes no virtual environment ({said[-1]}); on Debian or Ubuntu: apt install python3-venv"
        )
    install_torch(python)
    pip(python, ["-e", ".[test]" if name == "test" else "."], "the package and what it needs")
    stamp.write_text(wanted)
    return python


def fingerprint() -> str:
    """Changes when an environment has to be made anew: other requirements, another Python, a moved folder."""
    text = f"{platform.python_version()} {ROOT} {TORCH} {has_nvidia_gpu()}\n"
    return hashlib.sha256(text.encode() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()


def install_torch(python: Path) -> None:
    """torch for this machine: without an NVIDIA GPU the CPU build where pip finds one, a tenth of the size."""
    if sys.platform == "linux" and not has_nvidia_gpu():
        # pip's general index has no "+cpu" build; torch's own index and local wheel folders do.
        try:
            pip(python, [f"torch=={TORCH}+cpu"], f"torch {TORCH} for CPUs")
            return
        except InstallError as error:
            say(f"{error}; trying the general build, a download of some gigabytes")
    pip(python, [f"torch=={TORCH}"], f"torch {TORCH}")


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def pip(python: Path, what: list[str], title: str) -> None:
    """Install. Raises InstallError with pip's last words."""
    say(f"installing {title}")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise InstallError(f"pip could not install {title}: {errors[-1].removeprefix('ERROR: ')}")


# The environment that we were put into


def findings() -> list[str]:
    """What is there and what is missing, in sentences. Raises nothing."""
    found = []
    for look in (look_at_python, look_at_torch, look_at_requirements, look_at_kernels, look_at_shm):
        try:
            found += look()
        except Exception as error:  # a check that fails must not keep ComfyUI from starting
            found.append(f"{look.__name__.removeprefix('look_at_')} could not be checked: {error}.")
    return found


def look_at_python() -> list[str]:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return [f"Python {version} is too old: the nodes need 3.10 or newer."]
    return [f"Python {version} is fine."]


def look_at_torch() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return ["torch is not installed here; ComfyUI brings it, and we never install or change it."]
    import torch

    found = [f"torch {torch.__version__} is here and is left as it is."]
    distributed = torch.distributed
    if sys.platform != "linux" or not distributed.is_available():
        found.append(
            "A pool of workers cannot start here: it needs Linux and torch.distributed; on Windows use WSL2. "
            "The nodes are listed all the same."
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names:
        found.append("There is no CUDA device: a pool runs one process per core, at most 4, to try things out.")
    elif not distributed.is_available() or not distributed.is_nccl_available():
        found.append(f"{len(names)} CUDA devices ({', '.join(names)}), but this torch has no NCCL to join them.")
    else:
        found.append(f"{len(names)} CUDA device{'s' * (len(names) > 1)}, with NCCL: {', '.join(names)}.")
    return found


def look_at_requirements() -> list[str]:
    found, missing = [], []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?", line)
        if line.startswith("#") or not match:
            continue
        name, least = match.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if least and numbers(version) < numbers(least):
            missing.append(f"{name} {least} or newer (here is {version})")
        else:
            found.append(f"{name} {version}")
    if missing:
        return [f"Missing: {', '.join(missing)}; run {sys.executable} -m pip install -r {ROOT / 'requirements.txt'}."]
    return [f"All requirements are here: {', '.join(found)}."]


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def look_at_kernels() -> list[str]:
    there = [title for module, title in KERNELS.items() if importlib.util.find_spec(module) is not None]
    if there:
        return [f"Attention kernels: {', '.join(there)}, and torch's own."]
    return ["Attention uses torch's own kernels; flash-attn, if you install it, is used on GPUs that it supports."]


def look_at_shm() -> list[str]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return ["There is no /dev/shm: a VAE and some models reach the workers through it."]
    usage = shutil.disk_usage(shm)
    if usage.free < LEAST_SHM_BYTES:
        return [
            f"/dev/shm has {usage.free >> 20} MiB free, too little to hand a VAE to the workers; "
            "start a container with --shm-size=1g."
        ]
    return [f"/dev/shm has {usage.free >> 20} MiB free."]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
