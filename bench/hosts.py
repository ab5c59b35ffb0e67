"""Where ComfyUI is on this machine, and which Python each checkout runs with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def checkouts() -> list[Path]:
    """ComfyUI checkouts: those of $COMFYUI_DIR (several with the path separator), else the usual places.

    The usual places: ComfyUI* beside this checkout, ~/ComfyUI, ~/comfy/ComfyUI*.
    """
    named = os.environ.get("COMFYUI_DIR")
    if named:
        candidates = [Path(entry).expanduser() for entry in named.split(os.pathsep) if entry]
    else:
        home = Path.home()
        candidates = [*sorted(ROOT.parent.glob("ComfyUI*")), home / "ComfyUI"]
        candidates += sorted((home / "comfy").glob("ComfyUI*"))
    return list({path.resolve(): None for path in candidates if (path / "comfy" / "sd.py").is_file()})


def python_of(checkout: Path) -> str:
    """The Python with this checkout's requirements: its own environment's, else $COMFYUI_PYTHON, else ours."""
    for venv in (".venv", "venv"):
        python = checkout / venv / "bin" / "python"
        if python.exists():
            return str(python)
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


def version_of(checkout: Path) -> str:
    """ComfyUI's version, from its own file; the folder's name when it has none."""
    file = checkout / "comfyui_version.py"
    text = file.read_text() if file.is_file() else ""
    _, _, value = text.partition("__version__ = ")
    return value.strip().strip("\"'") or checkout.name
