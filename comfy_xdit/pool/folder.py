"""A pool's private folder: its socket, its log, its stores and its locks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import PoolError
from .locks import Lock

MAX_SOCKET_PATH_BYTES = 107
"""sun_path holds 108 bytes with its terminating zero (unix(7))."""


def base_folder() -> Path:
    """Where this user's pools live: $COMFY_XDIT_HOME, else /tmp/comfy-xdit-<uid>.

    Not $XDG_RUNTIME_DIR: it goes away at logout, which a pool outlives, and a ComfyUI that is run as a
    service has none, so that it and the command line would look in different places.
    """
    home = os.environ.get("COMFY_XDIT_HOME")
    return Path(home).absolute() if home else Path(f"/tmp/comfy-xdit-{os.getuid()}")


def own_folder() -> Path:
    """`base_folder`, made when missing. Raises PoolError where it can't be made, or others can enter it."""
    path = base_folder()
    _make_private(path)
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolFolder:
    """Paths of one pool. Whoever can write here can command the workers, hence mode 0700."""

    name: str
    path: Path

    @property
    def socket(self) -> Path:
        return self.path / "socket"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def key(self) -> Path:
        """What workers of other machines must hold; stays when the pool ends."""
        return self.path / "key"

    @property
    def counter(self) -> Path:
        """The last generation's number: a new supervisor goes on from it, so that no number returns."""
        return self.path / "generation"

    def ranks_store(self, attempt: int) -> Path:
        return self.path / f"ranks-{attempt}"

    def rpc_store(self, generation: int) -> Path:
        return self.path / f"rpc-g{generation}"

    def note_generation(self, number: int) -> None:
        """Keep it in `counter`. Raises OSError when that can't be written."""
        handle = os.open(self.counter, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            # In place and always as long: on a full disk the old number is kept, or the new one, never none.
            os.pwrite(handle, b"%20d\n" % number, 0)
        finally:
            os.close(handle)

    def last_generation(self) -> int:
        """What `counter` says; 0 when there was none."""
        try:
            return int(self.counter.read_text())
        except (OSError, ValueError):
            return 0

    def clear(self) -> None:
        """Remove what an earlier supervisor left; only for the holder of the `alive` lock."""
        for pattern in ("socket", "ranks-*", "rpc-g*"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        """Whether the lock `name` ("alive" of the supervisor, "start" of who starts one) was free.

        It is held until the block ends. A lock of a dead process is free: the kernel lets go of it.
        """
        lock = self.lock(name)
        try:
            yield lock.take()
        finally:
            lock.release()

    def lock(self, name: str) -> Lock:
        """The lock `name`, not taken yet."""
        return Lock(self.path / f"{name}.lock")

    def make(self) -> None:
        """Make the folder, and the one that it is in, where they are missing. Raises PoolError."""
        for path in (self.path.parent, self.path):
            _make_private(path)


def pool_folder(name: str) -> PoolFolder:
    """The folder of the pool `name`, made when missing.

    Raises PoolError for a bad name, and for a folder that cannot be made or that others can enter.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name):
        raise PoolError(f"{name!r} cannot name a pool; use 1 to 32 letters, digits, - and _", kind="input")
    folder = PoolFolder(name=name, path=base_folder() / name)
    length = len(os.fsencode(folder.socket))
    if length > MAX_SOCKET_PATH_BYTES:
        raise PoolError(
            f"the path of the pool's socket has {length} bytes, and a socket's path may have "
            f"{MAX_SOCKET_PATH_BYTES}; set COMFY_XDIT_HOME to a shorter folder"
        )
    folder.make()
    return folder


def where_log(name: str) -> str:
    """How to find the log of the pool `name`, for sentences: those name no path of the machine."""
    return f"`comfy-xdit pool status --name {name}` tells where the log is"


def unwritable(folder: PoolFolder, error: OSError) -> PoolError:
    """What to tell when the folder can't be written."""
    return PoolError(
        f"cannot write to the folder where pool {folder.name!r} keeps its files ({error.strerror or 'unknown error'}); "
        "make room there, or set COMFY_XDIT_HOME to another folder"
    )


def _make_private(path: Path) -> None:
    way_out = "set COMFY_XDIT_HOME to a folder of your own that can be written"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # lstat: in /tmp, somebody else could have left a link here that leads to a folder of theirs.
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PoolError(f"the folder where the pool would keep its socket belongs to someone else; {way_out}")
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise PoolError(f"cannot use the folder of the pool's socket ({error.strerror}); {way_out}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PoolError(f"cannot write to the folder of the pool's socket; {way_out}")
