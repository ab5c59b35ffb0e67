"""How soon workers are started again."""

from __future__ import annotations

LONGEST_PAUSE_S = 30.0


class Pace:
    """Counts the attempts that came to nothing: no worker has ended a message since. Any thread may use it."""

    def __init__(self) -> None:
        self._num_in_vain = 0

    def began(self) -> None:
        """An attempt begins; in vain, until it shows that it works."""
        self._num_in_vain += 1

    def worked(self) -> None:
        """A worker did what it is for."""
        self._num_in_vain = 0

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next attempt: none after one that worked, then more and more."""
        if self._num_in_vain < 2:
            return 0.0
        return min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(self._num_in_vain, 10))
