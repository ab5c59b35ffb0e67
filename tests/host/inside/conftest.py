"""Brings one ComfyUI checkout into this process; see `test_host.py`, which starts it."""

import contextlib
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHECKOUT = os.environ.get("COMFYUI_UNDER_TEST")

if CHECKOUT:
    BASE = tempfile.mkdtemp(prefix="comfy-xdit-host-")
    # Pools of these tests are not to be found by, nor mistaken for, the user's.
    os.environ["COMFY_XDIT_HOME"] = f"{BASE}/pools"
    runpy.run_path(str(ROOT / "nodes" / "parity" / "host.py"))["enter"](CHECKOUT, f"{BASE}/comfyui")
    sys.path.append(str(Path(__file__).resolve().parent))


def pytest_ignore_collect(collection_path):
    return None if CHECKOUT else True


@pytest.fixture(scope="session")
def models():
    """Folder of the tiny models, one file per kind."""
    from comfy_xdit_nodes.parity import models

    folder = Path(BASE) / "comfyui" / "models" / "diffusion_models"
    models.write_all(folder)
    return folder


@pytest.fixture
def fake(monkeypatch):
    """A pool inside the process, in place of the one that would be started; it knows single evaluations only."""
    import comfy.model_management
    import comfy_xdit_nodes.native.checkpoint
    import comfy_xdit_nodes.run
    import comfy_xdit_nodes.whole_run
    import native_models
    from fake_pool import FakePool

    pool = FakePool()
    monkeypatch.setattr(comfy_xdit_nodes.run, "connect", lambda setting: pool)
    # It answers as workers with diffusers' classes do.
    monkeypatch.setattr(comfy_xdit_nodes.native.checkpoint, "OF_DIFFUSERS", native_models.DIFFUSERS)
    monkeypatch.setattr(comfy_xdit_nodes.whole_run, "why_step_mode", lambda *run: "the pool is a fake")
    yield pool
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="session")
def pools():
    """`pools(num_ranks, **degrees)`: the setting of a real pool of CPU workers, ended with the session."""
    from comfy_xdit_nodes.pool import PoolSetting

    from comfy_xdit.pool.stop import stop

    names = set()

    def setting(num_ranks, **degrees):
        names.add(f"ranks{num_ranks}")
        return PoolSetting(name=f"ranks{num_ranks}", devices=f"cpu:{num_ranks}", **degrees)

    yield setting
    for name in names:
        with contextlib.suppress(ConnectionError):
            stop(name)


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def inference_mode():
    import torch

    with torch.inference_mode():
        yield


def pytest_sessionfinish():
    if CHECKOUT:
        shutil.rmtree(BASE, ignore_errors=True)
