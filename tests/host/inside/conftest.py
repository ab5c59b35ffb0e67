"""Brings one ComfyUI checkout into this process; see `test_host.py`, which starts it."""

import os
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHECKOUT = os.environ.get("COMFYUI_UNDER_TEST")

if CHECKOUT:
    # Our `nodes` folder must not be found as ComfyUI's `nodes.py`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path.insert(0, CHECKOUT)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    BASE = tempfile.mkdtemp(prefix="comfy-xdit-host-")
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", BASE]
    for kind in ("diffusion_models", "vae", "checkpoints", "loras"):
        (Path(BASE) / "models" / kind).mkdir(parents=True)

    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import folder_paths
    import torch

    folder_paths.set_output_directory(f"{BASE}/output")
    sys.argv = arguments
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / "comfy_xdit" / "mount.py"))["mount"]("comfy_xdit", "comfy_xdit_nodes")


def pytest_ignore_collect(collection_path):
    return True if not CHECKOUT else None


@pytest.fixture(scope="session")
def models():
    """Folder of the tiny models, one file per kind."""
    import tiny

    folder = Path(BASE) / "models" / "diffusion_models"
    tiny.write_all(folder)
    yield folder


@pytest.fixture(autouse=True)
def no_grad():
    import torch

    with torch.inference_mode():
        yield


def pytest_sessionfinish():
    if CHECKOUT:
        import shutil

        shutil.rmtree(BASE, ignore_errors=True)
