"""Whose an error is: the user's mistake, a device that is full, or, all the others, a fault of ours."""

from __future__ import annotations

import errno
import re

import torch


class InputError(ValueError):
    """What a user or a host gave cannot be done; `str(error)` is one sentence with the way out.

    Raised by our own checks only: a ValueError of a library says nothing about whose mistake it is.
    """


# The name by itself is newer than some versions of torch that hosts have.
_OUT_OF_MEMORY = (
    MemoryError,
    *(place.OutOfMemoryError for place in (torch, torch.cuda) if hasattr(place, "OutOfMemoryError")),
)

_TEXTS = re.compile(
    r"out of memory"  # CUDA's and HIP's own, also as NCCL passes them on
    r"|(can't|cannot|unable to) allocate memory|not enough memory"  # the main memory
    r"|(BLAS|SOLVER|SPARSE|DNN)\w*_ALLOC_FAILED|FFT_ALLOC_FAILED|MIOPEN\w*AllocFailed"
    r"|failed to (cuda|hip) (host )?[cm]?alloc",  # NCCL
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on the host or a device, whichever library says so."""
    if isinstance(error, _OUT_OF_MEMORY) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch has one type for nearly everything that CUDA, its libraries and NCCL report.
    return isinstance(error, RuntimeError) and _TEXTS.search(str(error)) is not None
