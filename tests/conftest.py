"""Make the packages importable under their fixed names from this checkout, installed or not."""

import os
import runpy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
runpy.run_path(str(Path(__file__).resolve().parent.parent / "comfy_xdit" / "mount.py"))["mount"](
    "comfy_xdit", "comfy_xdit_worker"
)
