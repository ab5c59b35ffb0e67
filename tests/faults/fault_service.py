"""A service for the pool's tests: it echoes, waits, fails and gets stuck on command.

Imported by the tests and, through `--path`, by the workers: both need these message classes.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit.errors import InputError
from comfy_xdit.messages import Message, Result, Status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Echo(Message):
    value: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sleep(Message):
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raise(Message):
    """Raise `error` ("input", "memory", "fault") on the given ranks; the others all_reduce when `meet`."""

    error: str
    ranks: list[int]
    meet: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduce(Message):
    """Sum over the ranks, `rounds` times."""

    value: float
    rounds: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Message):
    """Become resident; an empty name frees all."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Journal(Message):
    """What this rank has done since it started."""


class FaultService:
    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size = rank, world_size
        self.kept: list[Message] = []
        self.journal: list[str] = []
        self.has_met = False

    @property
    def has_communicated(self) -> bool:
        return self.has_met

    def free_others(self) -> None:
        """It holds no more than one."""

    def forget_abandoned(self) -> None:
        """Nobody lends it anything."""

    def abandon(self) -> None:
        """A sleeping rank cannot be woken."""

    def handle(self, message: Message) -> Result:
        self.journal.append(type(message).__name__)
        self.has_met = False
        if isinstance(message, Echo):
            return Result(value=message.value)
        if isinstance(message, Sleep):
            time.sleep(message.seconds)
            return Result(value=os.getpid())
        if isinstance(message, Raise):
            return self._raise(message)
        if isinstance(message, Reduce):
            return self._reduce(message)
        if isinstance(message, Keep):
            self.kept = [message] if message.name else []
            return Result()
        if isinstance(message, Status):
            return Result(value=self.status())
        if isinstance(message, Journal):
            return Result(value=list(self.journal))
        raise InputError(f"the test service does not know {type(message).__name__}")

    def _raise(self, message: Raise) -> Result:
        if self.rank in message.ranks:
            if message.error == "input":
                raise InputError("the number 7 is too large; use 6 or less")
            if message.error == "memory":
                raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB. Details follow.")
            raise KeyError("a bug")
        if message.meet:
            self.has_met = True
            dist.all_reduce(torch.ones(1))
        return Result()

    def _reduce(self, message: Reduce) -> Result:
        total, self.has_met = torch.zeros(1), True
        for _ in range(message.rounds):
            total = torch.full((1,), message.value)
            dist.all_reduce(total)
        return Result(value=float(total))

    def setup(self) -> list[Message]:
        return []

    def residents(self) -> list[Message]:
        return list(self.kept)

    def forget_client(self) -> None:
        self.journal.append("forgot")

    def status(self) -> dict[str, Any]:
        return {"models": [keep.name for keep in self.kept if isinstance(keep, Keep)], "loras": []}


class BrokenService:
    """Cannot be made."""

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        raise RuntimeError("the driver is too old")
