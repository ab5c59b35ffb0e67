"""What becomes of the workers after a failure: the one place that decides it.

A client whose message failed asks, and is told "keep", or that the workers are lost, with the cause.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from .failure_policy import STUCK_AFTER_S, groups_survive, is_local, worst
from .membership import Membership, WorkerLine


@dataclasses.dataclass(frozen=True)
class Keep:
    """The workers go on: the client may tell what they answered to the message with these numbers."""

    generation: int
    serial: int


@dataclasses.dataclass(frozen=True)
class Cause:
    """The failure that says why the workers are lost. failure: the fields of its `Failure`.

    generation, serial: of the message that failed. Its client may have given it up, and sent another since.
    """

    generation: int
    serial: int
    failure: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Restart:
    """The workers must be started anew. cause: the failure that caused it, if one did."""

    reason: str
    cause: Cause | None


@dataclasses.dataclass(frozen=True)
class _Question:
    number: tuple[int, int]
    is_broken: bool
    asked_at: float


@dataclasses.dataclass(frozen=True)
class _Failed:
    """A message in which a rank failed. name: of its class; failures: rank → the fields of its `Failure`."""

    name: str
    since: float
    failures: dict[int, dict[str, Any]]


class Judge:
    """Watches how the ranks of `membership` end their messages."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._question: _Question | None = None
        # By number, until all ranks have ended it. A client that gave up sends the next one meanwhile, and a rank may
        # end that while another still waits for it in this one.
        self._failed: dict[tuple[int, int], _Failed] = {}

    def ended(self, worker: WorkerLine, number: tuple[int, int], failure: dict[str, Any] | None) -> None:
        """A rank has ended what it ran. number: generation and serial number; failure: the fields of its `Failure`."""
        worker.done = number
        if failure is not None:
            failed = self._failed.setdefault(number, _Failed(worker.running or "", time.monotonic(), {}))
            failed.failures[worker.rank] = failure

    def ask(self, generation: int, serial: int, *, is_broken: bool) -> None:
        """A client wants to know what becomes of its message. is_broken: the connection to a rank has ended."""
        self._question = _Question((generation, serial), is_broken, time.monotonic())

    def forget(self) -> None:
        """Nobody waits for an answer any more."""
        self._question = None

    def renew(self) -> None:
        """The workers are gone; what comes is said by others."""
        self._question = None
        self._failed.clear()

    def look(self) -> Keep | Restart | None:
        """What is known by now; None while all is well, or a rank's report is on its way."""
        for number, failed in list(self._failed.items()):
            if not self._is_sound(number, failed):
                failure = worst(list(failed.failures.values()))
                return Restart(f"rank {failure['rank']} failed in {failed.name}", Cause(*number, failure))
            if self._have_ended(number):
                del self._failed[number]
        question = self._question
        if question is None:
            return None
        if question.is_broken:
            # Of a worker that ended the coordinator learns at once; it then has a better reason than this one.
            late_s = time.monotonic() - question.asked_at
            return Restart("a connection between client and workers broke", None) if late_s > STUCK_AFTER_S else None
        if self._have_ended(question.number):
            self._question = None
            return Keep(*question.number)
        return None

    def cause(self) -> Cause | None:
        """The failure to tell when the workers are lost in a message of which a rank has told why it failed.

        One that is out of memory, or found a mistake, may have taken the others with it. Else their failures are
        consequences, and how they were lost says more.
        """
        number = max((worker.done for worker in self._membership.workers.values()), default=(0, 0))
        failed = self._failed.get(number)
        told = [] if failed is None else failed.failures.values()
        causes = [failure for failure in told if failure["kind"] in ("memory", "input")]
        return Cause(*number, worst(causes)) if causes else None

    def _have_ended(self, number: tuple[int, int]) -> bool:
        """Whether all ranks have ended the message, or one after it."""
        return all(worker.done >= number for worker in self._membership.workers.values())

    def _is_sound(self, number: tuple[int, int], failed: _Failed) -> bool:
        """Whether the ranks' groups are usable, as far as they have ended the message."""
        if self._have_ended(number):
            return groups_survive(failed.name, [failed.failures.get(rank) for rank in self._membership.workers])
        return is_local(failed.name, failed.failures.values()) or time.monotonic() - failed.since < STUCK_AFTER_S
