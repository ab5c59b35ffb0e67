"""A MODEL's or a VAE's weights as a safetensors file in shared memory, written once, gone with its owner."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy_xdit_nodes.checkpoint import Checkpoint, open_checkpoint
from torch import Tensor

from comfy_xdit.weights.header import FLOATS

if TYPE_CHECKING:
    from comfy_xdit.pool.locks import Lock

log = logging.getLogger("comfy_xdit")

SHARED_MEMORY = Path("/dev/shm")

NAMES = {dtype: name for name, dtype in FLOATS.items()}

ALIGNMENT = 64
"""Bytes: what the memory of a tensor begins at a multiple of."""

MARGIN_BYTES = 64 * 2**20
"""Left free: others keep their own things in shared memory, and a full one kills them."""


def require_reachable(pool: Any, path: str, *, what: str, way_out: str) -> None:
    """Raises ValueError when weights that were exported are for a pool with ranks on other machines.

    what, way_out: for the sentence.
    """
    if pool.network is not None and is_copy(path):
        raise ValueError(
            f"pool {pool.name!r} is on {pool.network.num_machines} machines, and this {what} has no file that each of "
            f"them could read, only a copy in this machine's shared memory; {way_out}"
        )


def is_copy(path: str) -> bool:
    """Whether it is a file that `export_file` wrote."""
    return Path(path).resolve().parent == _folder(SHARED_MEMORY).resolve()


def export(owner: Any, weights: dict[str, Tensor], root: Path = SHARED_MEMORY) -> Checkpoint:
    """The checkpoint of `weights` in shared memory; removed when `owner` is collected, or at exit.

    Raises ValueError, in one sentence, when there is no room or the weights' type is not known.
    """
    way_out = f"{Checkpoint.way_out}, which needs no copy"
    return open_checkpoint(str(export_file(owner, weights, what="MODEL", way_out=way_out, root=root)))


def export_file(
    owner: Any,
    weights: dict[str, Tensor],
    *,
    what: str,
    way_out: str,
    root: Path = SHARED_MEMORY,
    names: dict[torch.dtype, str] = NAMES,
) -> Path:
    """Where `weights` lie in shared memory; the file is removed when `owner` is collected, or at exit.

    what, way_out: for the sentence of the ValueError when there is no room or no shared memory. names: as in `write`.
    """
    needed = sum(weight.numel() * weight.element_size() for weight in weights.values())
    folder = _private_folder(root, what, way_out)
    _remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if needed + MARGIN_BYTES > free:
        raise ValueError(
            f"handing this {what} to the workers takes {needed} bytes of shared memory, which has {free} free; "
            f"{way_out}, or make shared memory larger"
        )
    held = _new_file(folder)
    finalizer = weakref.finalize(owner, _remove, held, os.getpid())
    log.info("handing %.2f GB of weights to the workers through %s", needed / 1e9, held.path)
    try:
        write(held.path, weights, names)
    except BaseException:
        finalizer()
        raise
    return held.path


def write(path: Path, weights: dict[str, Tensor], names: dict[torch.dtype, str] = NAMES) -> None:
    """Fill a safetensors file, tensor after tensor: no second copy of the model in memory.

    names: the types of numbers that the weights may have. Raises ValueError for others.
    """
    entries, end = {}, 0
    for key, weight in weights.items():
        if weight.dtype not in names:
            raise ValueError(f"{key} is {weight.dtype}; the pool takes fp32, fp16, bf16 and plain fp8")
        begin, end = end, end + weight.numel() * weight.element_size()
        shape = list(weight.shape)
        entries[key] = {"dtype": names[weight.dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for weight in weights.values():
            flat = weight.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def _private_folder(root: Path, what: str, way_out: str) -> Path:
    """Our folder under `root`, which nobody else may enter. Raises ValueError when it is somebody else's."""
    if not root.is_dir():
        raise ValueError(
            f"this {what} has no file that the workers could read, and this machine has no shared memory; {way_out}"
        )
    folder = _folder(root)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ValueError(f"{folder.name} in shared memory is not a private folder of this user; remove it")
    return folder


def _folder(root: Path) -> Path:
    return root / f"comfy-xdit-{os.getuid()}"


def _new_file(folder: Path) -> Lock:
    """A new file that this process holds a lock on, as long as it lives: so others know that it is in use."""
    # Here, not at import: like the pool it takes modules that only Linux has.
    from comfy_xdit.pool.locks import Lock

    while True:
        held = Lock(folder / f"{uuid.uuid4().hex}.safetensors")
        if held.take():
            return held
        # Another process took it for a leftover, between its making and its lock.
        held.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed. Not told by process ids: containers that share the folder don't
    see each other's.
    """
    from comfy_xdit.pool.locks import Lock

    for path in folder.glob("*.safetensors"):
        lock = Lock(path)
        if lock.take():
            path.unlink(missing_ok=True)
        lock.release()


def _remove(held: Lock, pid: int) -> None:
    """pid: whose file it is; in a fork of that process it stays."""
    if os.getpid() == pid:
        held.path.unlink(missing_ok=True)
    held.release()
