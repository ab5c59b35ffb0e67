"""What one rank's host did in a run on pretended devices, in order: the record that the checks and `nccl_sim` read."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

OURS = ("/comfy_xdit/", "/worker/", "/diffusers/models", "/distvae/", "/yunchang/")
"""Whose lines a record names."""


class Kernel(NamedTuple):
    """The host launches a kernel on its compute stream.

    is_first: CUDA may have to load it. is_new_size: so may the library that chooses it by its tensors' sizes.
    """

    name: str
    is_first: bool
    is_new_size: bool = False


class Wait(NamedTuple):
    """The host waits for its compute stream; for_all: for every stream of the device."""

    what: str
    for_all: bool
    where: str


Message = tuple[int, int, int, str]
"""Its source, its destination, how many numbers, and their dtype."""


class Launch(NamedTuple):
    """The host gives NCCL an operation; it begins when the compute stream comes to this point.

    kind: the collective, "p2p" for a lone send or receive, or "batch". group: name and ranks. detail: what has to be
    alike on all ranks. messages: those that this rank sends and receives in a "p2p", a "batch" or an "all_to_all".
    """

    number: int
    kind: str
    group: str
    ranks: tuple[int, ...]
    detail: tuple[Any, ...]
    messages: tuple[Message, ...]
    where: str


class Follow(NamedTuple):
    """The compute stream goes on when operation `number` is done."""

    number: int


class Meet(NamedTuple):
    """A collective of the hosts (gloo, or the making of a group): begun here. detail: what has to be alike."""

    number: int
    kind: str
    group: str
    ranks: tuple[int, ...]
    detail: tuple[Any, ...]
    where: str


class Met(NamedTuple):
    """The host waits until the collective of the hosts is done."""

    number: int


class Block(NamedTuple):
    """A block of the transformer begins; "": it ends."""

    name: str


Event = Kernel | Wait | Launch | Follow | Meet | Met | Block


def where() -> str:
    """The line of the project, or of a library that it runs, from which this was reached."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in OURS):
            short = name.rsplit("/site-packages/")[-1].split("/")
            return f"{'/'.join(short[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
