"""What ComfyUI imports: the nodes, their names and their help pages.

Nothing is started and no GPU is touched here; the first node that needs a pool starts one.
"""

import runpy
from pathlib import Path

_mount = runpy.run_path(str(Path(__file__).resolve().parent / "comfy_xdit" / "mount.py"))["mount"]
_mount("comfy_xdit", "comfy_xdit_nodes")

from comfy_xdit_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
