"""Make the packages importable under their fixed names from this checkout, installed or not."""

import contextlib
import os
import runpy
from pathlib import Path

# ComfyUI's own environment, where the host tests run, may have no hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # A busy machine is slow, which says nothing about the code.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")

os.environ.setdefault("OMP_NUM_THREADS", "1")
runpy.run_path(str(Path(__file__).resolve().parent.parent / "comfy_xdit" / "mount.py"))["mount"](
    "comfy_xdit", "comfy_xdit_worker", "comfy_xdit_bench", "comfy_xdit_training"
)
