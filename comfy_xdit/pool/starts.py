"""What came of starting the workers, and whether it is tried again."""

from __future__ import annotations

from .folder import where_log

MAX_FAILED_STARTS = 3

MAX_RAISED_TRIALS = 2
"""First exchanges between the ranks in a row that raise, until no other is tried. Wrong numbers count at once."""


class Starts:
    """Counts the starts in a row that failed. Of the coordinator's thread, but for `held`, which any may read."""

    def __init__(self) -> None:
        self._num_failed = self._num_raised = 0
        self.last_error = self.held = ""
        """held: why no attempt begins until a client asks again, as the devices can't reach each other."""

    def worked(self) -> None:
        """All workers are up."""
        self._num_failed = self._num_raised = 0
        self.last_error = ""

    def failed(self, reason: str) -> None:
        """The workers are gone before all were up. What a worker said itself goes before `reason`."""
        self._num_failed += 1
        self.last_error = self.last_error or reason

    def hold(self, why: str) -> None:
        """Begin no other attempt: it would end the same way."""
        self.held = self.last_error = why
        self._num_failed = MAX_FAILED_STARTS

    def release(self) -> bool:
        """A client asks again, so attempts may begin. Returns whether they were held."""
        was_held = bool(self.held)
        if was_held:
            self.held = ""
            self.worked()
        return was_held

    def has_raised_too_often(self) -> bool:
        """Count a first exchange that raised: perhaps only because a peer had just been ended."""
        self._num_raised += 1
        return self._num_raised >= MAX_RAISED_TRIALS

    @property
    def is_failing(self) -> bool:
        return self._num_failed >= MAX_FAILED_STARTS

    @property
    def loads_residents(self) -> bool:
        """Whether workers load again what they held: not before the last attempt, it may be what fails."""
        return self._num_failed < MAX_FAILED_STARTS - 1

    def hopeless(self, pool: str) -> str | None:
        """A sentence for who waits for the pool of that name in vain; None while there is hope."""
        if self.held:
            return f"pool {pool!r} can't work: {self.held} ({where_log(pool)})"
        if not self.is_failing:
            return None
        why = self.last_error or "they ended before they were up"
        return f"the workers of pool {pool!r} failed to start {self._num_failed} times: {why}; {where_log(pool)}"
