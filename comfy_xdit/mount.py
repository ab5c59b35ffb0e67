"""One fixed import name for each of our folders, in every process.

ComfyUI imports a node pack under a name made from its path, so a class that the ComfyUI process
reached as `<path>.comfy_xdit.messages.Denoise` could not be decoded by a worker that knows it as
`comfy_xdit.messages.Denoise`. Putting the checkout on `sys.path` would give one name, but our
`nodes/` would then shadow ComfyUI's `nodes.py`. So the packages are registered by name.

This file is loaded by its path, before any of those names exist: it imports the standard library only.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

IN_CHECKOUT = {
    "comfy_xdit": "comfy_xdit",
    "comfy_xdit_nodes": "nodes",
    "comfy_xdit_worker": "worker",
    "comfy_xdit_bench": "bench",
    "comfy_xdit_training": "training",
}
"""Import name → its folder in a checkout. Installed, a package's folder has its import name."""

BOOT = ROOT / "comfy_xdit" / "boot.py"
"""Run by its path it runs one of our modules, whether anything is installed or not."""

PACKAGES = {
    name: ROOT / name if (ROOT / name).is_dir() else ROOT / folder for name, folder in IN_CHECKOUT.items()
}


def mount(*names: str) -> None:
    """Make the packages `names` importable from this copy of ours; those imported from it already are left alone.

    Raises ImportError when `comfy_xdit` is already imported from somewhere else: two copies in one
    process would disagree about the messages they exchange.
    """
    for name in names:
        loaded = sys.modules.get(name)
        if loaded is not None:
            if Path(loaded.__file__ or "").resolve().parent != PACKAGES[name]:
                raise ImportError(
                    f"{name} is already loaded from {loaded.__file__}, not from {PACKAGES[name]}; "
                    "keep one copy: uninstall the package or remove the second custom node"
                )
            continue
        spec = importlib.util.spec_from_file_location(
            name, PACKAGES[name] / "__init__.py", submodule_search_locations=[str(PACKAGES[name])]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
