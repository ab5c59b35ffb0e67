"""Make this process a ComfyUI: run by its path, before anything of ComfyUI can be imported."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def enter(checkout: str, base: str) -> None:
    """Import ComfyUI from `checkout` on the CPU, its models and output under the empty folder `base`.

    After it `comfy`, `nodes` (ComfyUI's), `comfy_xdit`, `comfy_xdit_nodes` and `comfy_xdit_bench` can be imported.
    """
    # Our `nodes` folder must not be found as ComfyUI's `nodes.py`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    sys.path.insert(0, checkout)
    for kind in ("diffusion_models", "vae", "checkpoints", "loras", "text_encoders"):
        (Path(base) / "models" / kind).mkdir(parents=True)

    import comfy.options

    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", base]
    import comfy.cli_args

    sys.argv = arguments
    runpy.run_path(str(ROOT / "comfy_xdit" / "mount.py"))["mount"](
        "comfy_xdit", "comfy_xdit_nodes", "comfy_xdit_bench"
    )
