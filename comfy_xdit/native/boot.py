"""ComfyUI's model classes in a worker: no server, no nodes, no reading of the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.errors import InputError
from comfy_xdit.messages import UseComfy

RESTART = "restart the pool, and ComfyUI if it was updated while it ran"

LOCAL = {"disable_async_offload": True, "disable_pinned_memory": True, "disable_dynamic_vram": True}
"""Options that a worker sets for itself: it keeps its weights where they are, and offloads nothing."""


def boot(wanted: UseComfy, device: torch.device) -> None:
    """Import the classes of the ComfyUI that `wanted` names.

    To be called on the main thread: ComfyUI asks for the current device, which CUDA keeps for each thread. Options are
    set before anything else is imported, since some of them choose at import what attention computes with.
    Raises InputError when the folder is no ComfyUI, or not the one that was meant; then nothing of it was imported.
    """
    assert threading.current_thread() is threading.main_thread(), "another thread has another current device"
    _check(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _require_imported_from(wanted.folder)
    _set_options(wanted.options, device)
    for name in ("comfy.model_management", "comfy.ops", "comfy.model_detection", "comfy.model_base"):
        importlib.import_module(name)


def version_of(folder: str) -> str:
    """What the checkout calls itself; "" where it does not say."""
    scope: dict[str, Any] = {}
    try:
        text = (Path(folder) / "comfyui_version.py").read_text("utf-8")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        scope[name.strip()] = value.strip().strip("\"'")
    return str(scope.get("__version__", ""))


def sources_of(folder: str) -> str:
    """A hash of the Python files of its package `comfy`: a checkout changes between two versions, too."""
    return hash_of_sources(Path(folder) / "comfy")


def hash_of_sources(*roots: Path) -> str:
    """Of the Python files in the folders `roots`, their names and what is in them."""
    seen = hashlib.blake2b(digest_size=16)
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            seen.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            seen.update(content)
    return seen.hexdigest()


def kitchen_version() -> str:
    """Of comfy-kitchen, which computes with quantised weights; "" where it is not installed."""
    try:
        return importlib.metadata.version("comfy-kitchen")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check(wanted: UseComfy) -> None:
    if not os.path.isfile(os.path.join(wanted.folder, "comfy", "model_detection.py")):
        raise InputError(
            "the workers find no ComfyUI in the folder that this ComfyUI runs from; every machine of a pool needs the "
            "same ComfyUI in the same folder"
        )
    found = {
        "ComfyUI": (version_of(wanted.folder), wanted.version),
        "comfy-kitchen": (kitchen_version(), wanted.kitchen),
    }
    for name, (here, there) in found.items():
        if here != there:
            raise InputError(
                f"the workers have {name} {here or 'of no version'}, this ComfyUI {there or 'none'}; {RESTART}"
            )
    if sources_of(wanted.folder) != wanted.sources:
        raise InputError(f"the workers have ComfyUI {wanted.version} with other sources than this one; {RESTART}")


def _require_imported_from(folder: str) -> None:
    """Put the folder first on the path. Raises InputError when `comfy` is then found elsewhere, too.

    It is a namespace package: another folder of that name would be mixed into it.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import comfy

    own = os.path.realpath(os.path.join(folder, "comfy"))
    if {os.path.realpath(path) for path in comfy.__path__} != {own}:
        raise InputError(
            "the workers find a second Python package named comfy beside ComfyUI's; uninstall it from their Python"
        )


def _set_options(options: dict[str, Any], device: torch.device) -> None:
    # Its arguments stay unread: this process was started with another program's.
    importlib.import_module("comfy.options")
    cli_args = importlib.import_module("comfy.cli_args")
    told = {**options, **LOCAL, "cpu": device.type == "cpu"}
    if "fast" in told:
        told["fast"] = {cli_args.PerformanceFeature(name) for name in told["fast"]}
    for name, value in told.items():
        if not hasattr(cli_args.args, name):
            raise InputError(f"the workers' ComfyUI has no option {name!r}; {RESTART}")
        setattr(cli_args.args, name, value)
