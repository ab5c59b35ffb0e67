"""What becomes of the workers after a failure: the one place that decides it.

A client whose message failed asks, and is told "keep", or that the workers are lost, with the cause.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from .roster import Roster
from .verdict import LOCAL, STUCK_AFTER_S, groups_survive, worst


@dataclasses.dataclass(frozen=True)
class Keep:
    """The workers go on: the client may tell what they answered to the message with these numbers."""

    generation: int
    serial: int


@dataclasses.dataclass(frozen=True)
class Restart:
    """The workers must be started anew. failure: the fields of the `Failure` that caused it, if one did."""

    reason: str
    failure: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class _Question:
    number: tuple[int, int]
    is_broken: bool
    asked_at: float


class Judge:
    """Watches how the ranks of `roster` end their messages."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._question: _Question | None = None
        self.message = ""
        """Class name of the message that a rank began last."""

    def ask(self, generation: int, serial: int, *, is_broken: bool) -> None:
        """A client wants to know what becomes of its message. is_broken: the connection to a rank has ended."""
        self._question = _Question((generation, serial), is_broken, time.monotonic())

    def forget(self) -> None:
        """Nobody waits for an answer any more."""
        self._question = None

    def look(self) -> Keep | Restart | None:
        """What is known by now; None while all is well, or a rank's report is on its way."""
        failure = self._broken()
        if failure is not None:
            return Restart(f"rank {failure['rank']} failed in {self.message}", failure)
        question = self._question
        if question is None:
            return None
        if question.is_broken:
            # Of a worker that ended the door learns at once; it then has a better reason than this one.
            late_s = time.monotonic() - question.asked_at
            return Restart("a connection between client and workers broke", None) if late_s > STUCK_AFTER_S else None
        if all(worker.done >= question.number for worker in self._roster.workers.values()):
            self._question = None
            return Keep(*question.number)
        return None

    def cause(self) -> dict[str, Any] | None:
        """The failure to tell when the workers are lost in a message of which a rank has told why it failed.

        One that is out of memory, or found a mistake, may have taken the others with it. Else their failures are
        consequences, and how they were lost says more.
        """
        workers, last = list(self._roster.workers.values()), self._last
        is_over = self._question is None and all(worker.done == last for worker in workers)
        told = [worker.failure for worker in workers if worker.done == last and worker.failure is not None]
        causes = [failure for failure in told if failure["kind"] in ("memory", "input")]
        return worst(causes) if causes and not is_over else None

    @property
    def _last(self) -> tuple[int, int]:
        return max((worker.done for worker in self._roster.workers.values()), default=(0, 0))

    def _broken(self) -> dict[str, Any] | None:
        """The failure to tell, when the ranks ended a message in ways that leave their groups unusable."""
        workers, last = list(self._roster.workers.values()), self._last
        ended = [worker for worker in workers if worker.done == last]
        failed = [worker for worker in ended if worker.failure is not None]
        if not failed:
            return None
        if len(ended) == len(workers):
            sound = groups_survive(self.message, [w.failure for w in workers])
        else:
            late_s = time.monotonic() - min(worker.done_at for worker in failed)
            sound = late_s < STUCK_AFTER_S or self.message in LOCAL
        return None if sound else worst([worker.failure for worker in failed if worker.failure is not None])
