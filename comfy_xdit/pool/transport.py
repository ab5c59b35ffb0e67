"""How messages travel between a client and the workers: the interface that `sockets` and `rpc` both keep.

A lease's client and the workers are a *group*. The client sends a text and tensors to some ranks, and has a future for
each answer. A worker is given one request after the other, in the order that the client numbered them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    # Not at run time: the coordinator knows the transports' names before torch is imported.
    from torch import Tensor

SOCKETS, RPC = "sockets", "rpc"
"""The transports: of a pool on one machine, and of one on several."""

ASIDE = 0
"""The serial number of a message that does not wait for its lease; the others count from 1."""

Answer: TypeAlias = "tuple[str, list[Tensor]]"

Poll = Callable[[], object] | None
"""Called about every 50 ms while a client waits; what it raises ends the wait."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A client's message as a worker has it.

    pack: takes the answer's text and tensors, and gives what sends it, to be called at most once. What can fail
    (memory, a tensor that can't travel) fails in `pack`; the sending neither fails nor waits, also when the client
    is gone or doesn't read.
    """

    serial: int
    text: str
    tensors: list[Tensor]
    pack: Callable[[str, list[Tensor]], Callable[[], None]]


Serve = Callable[[Request], None]
"""A worker's handler. It runs on a thread of the transport, and leaves the work to others: the next message, also an
`ASIDE`, waits until it returns."""


class Group(Protocol):
    """Membership in the group of one generation."""

    generation: int

    @property
    def is_current(self) -> bool:
        """Whether this process is still in the group, and no connection of it was lost."""
        ...

    def leave(self) -> None:
        """Stop taking part; waits for nobody. Harmless when left already."""
        ...


class ClientGroup(Group, Protocol):
    """A client's membership."""

    def send(self, ranks: Sequence[int], serial: int, text: str, tensors: list[Tensor]) -> list[Future[Answer]]:
        """A future for each rank's answer; it fails with ConnectionError, at once, when the rank is gone.

        Never waits for a rank. Raises PoolError when there is no memory for the message.
        """
        ...


class Joiner(Protocol):
    """A client's way into groups."""

    def check(self, interface: str) -> None:
        """Raises PoolError where this process can be in no group of a pool that is reached through `interface`."""
        ...

    def join(self, pool: str, order: dict[str, Any], num_ranks: int, joined: Callable[[ClientGroup], None]) -> None:
        """Do as the coordinator's "join" orders, and call `joined` on success, perhaps later and on another thread."""
        ...

    def settle(self, poll: Poll) -> None:
        """Wait until a join that was given up is over."""
        ...
