"""Whether the process groups between the ranks can be trusted after a failure.

A rank that raised between two messages to other ranks leaves its peers waiting, or worse: a receive that it
posted takes what the next job sends, and that job gives wrong numbers or hangs. Then the workers must start
afresh. When every rank failed before it took part in any message, as with input that is no good, they can stay.
The coordinator asks here (`judge`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

STUCK_AFTER_S = 3.0
"""A rank that has not ended this long after another one failed waits for it in a collective."""

LOCAL = frozenset({"LoadModel", "LoadVAE", "SetPatches", "Hold", "Drop", "Unload", "Status", "LeaseEnded"})
"""Messages in which the ranks do not talk to each other."""

SAID_FIRST = ("memory", "input", "fault", "lost")
"""Kinds of failure, causes before consequences: peers of a rank that is out of memory fail too, otherwise."""


def worst(failures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The failure that explains the others."""
    return min(failures, key=lambda failure: SAID_FIRST.index(failure["kind"]))


def is_local(message: str, failures: Iterable[dict[str, Any] | None]) -> bool:
    """Whether no rank can wait for another in this message, so far as they failed in it.

    A worker whose groups are broken refuses what comes next, whatever it is, and says that it has communicated.
    """
    return message in LOCAL and not any(failure and failure["has_communicated"] for failure in failures)


def groups_survive(message: str, failures: Sequence[dict[str, Any] | None]) -> bool:
    """False when the workers must be restarted.

    message: class name of the message that was run. failures: the fields of each rank's `Failure`, None for success.
    Ranks that are out of memory start afresh too: what others hold, or left in pieces, fills their devices.
    """
    if len(failures) == 1 or is_local(message, failures) or not any(failures):
        return True
    return all(
        failure is not None and failure["kind"] != "memory" and not failure["has_communicated"]
        for failure in failures
    )
