"""A job as its ranks reported it, message by message."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One message to the ranks: when it began and ended, in seconds of the job, and what each rank reported."""

    begin: float
    end: float
    reports: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobReport:
    """seconds: wall time of the steps. began: when, on the clock of the reports' events."""

    seconds: float
    steps: tuple[Step, ...]
    began: float = 0.0

    @classmethod
    def of(cls, messages: Sequence[Sequence[dict[str, Any]]]) -> JobReport:
        """From the ranks' traced reports on one message after the other, by the ranks' own clock."""
        spans = [
            (
                min(report["began"] for report in reports),
                max(report["began"] + report["seconds"] for report in reports),
            )
            for reports in messages
        ]
        began = spans[0][0]
        steps = tuple(
            Step(begin=begin - began, end=end - began, reports=tuple(reports))
            for (begin, end), reports in zip(spans, messages, strict=True)
        )
        return cls(seconds=steps[-1].end, steps=steps, began=began)
