"""Which ComfyUI checkouts the host tests run in.

Two versions can't be imported into one process, so the tests proper (`inside/check_*.py`) run in a
process for each checkout, with that checkout's own Python.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

INSIDE = "COMFYUI_UNDER_TEST"


def checkouts() -> list[Path]:
    """ComfyUI checkouts: those of $COMFYUI_DIR, else what lies at the usual places."""
    named = os.environ.get("COMFYUI_DIR")
    if named:
        candidates = [Path(entry).expanduser() for entry in named.split(os.pathsep) if entry]
    else:
        home = Path.home()
        candidates = [*sorted(ROOT.parent.glob("ComfyUI*")), home / "ComfyUI"]
        candidates += sorted((home / "comfy").glob("ComfyUI*"))
    found = {path.resolve(): None for path in candidates if (path / "comfy" / "sd.py").is_file()}
    return list(found)


def python_of(checkout: Path) -> str:
    """The Python that has this checkout's requirements."""
    for venv in (".venv", "venv"):
        python = checkout / venv / "bin" / "python"
        if python.exists():
            return str(python)
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "checkout" in metafunc.fixturenames:
        found = checkouts()
        sentence = "no ComfyUI checkout: set COMFYUI_DIR, or put one beside this checkout or at ~/ComfyUI"
        none = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=sentence))]
        checkouts_or_none = [pytest.param(path, id=path.name) for path in found] or none
        # Session scope: a fixture may start one server for all tests of a checkout.
        metafunc.parametrize("checkout", checkouts_or_none, scope="session")
