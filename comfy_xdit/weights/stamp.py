"""Whether a file is still the one that was loaded."""

from __future__ import annotations

import os
import stat

from comfy_xdit.errors import InputError
from comfy_xdit.messages import FileStamp


def stamp(path: str) -> FileStamp:
    """The stamp of the file that `path` leads to now.

    Raises InputError for what is no file (a folder, a pipe, a device), OSError where nothing is.
    """
    try:
        status = os.stat(path)
    except ValueError:  # a zero byte, or what is no text
        raise InputError(f"{path!r} cannot be a path; choose a safetensors file") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{os.path.basename(path)} is not a file that can be mapped; choose a safetensors file")
    return FileStamp(size=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
