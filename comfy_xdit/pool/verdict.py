"""Whether the process groups between the ranks can be trusted after a failure.

A rank that raised between two collectives leaves its peers waiting, or worse: their next collective
pairs with another one of its own and gives wrong numbers. Then the workers must start afresh. After
an error that every rank raised alike, they can stay. Door and client both ask here, so they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STUCK_AFTER_S = 3.0
"""A rank that has not ended this long after another one failed waits for it in a collective."""

LOCAL = frozenset({"LoadModel", "LoadVAE", "SetPatches", "Hold", "Drop", "Unload", "Status", "TurnEnded"})
"""Messages in which the ranks do not talk to each other."""


SAID_FIRST = ("memory", "input", "fault", "lost")
"""Kinds of failure, causes before consequences: peers of a rank that is out of memory fail too, otherwise."""


def worst(failures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The failure that explains the others."""
    return min(failures, key=lambda failure: SAID_FIRST.index(failure["kind"]))


def groups_survive(message: str, failures: Sequence[str | None]) -> bool:
    """False when the workers must be restarted.

    message: class name of the message that was run. failures: each rank's failure kind, None for success.
    Only "input" counts as raised alike: a user's mistake is found before the first collective or at the
    same place everywhere, while ranks run out of memory one before the other.
    """
    if len(failures) == 1 or message in LOCAL or not any(failures):
        return True
    return all(kind == "input" for kind in failures)
