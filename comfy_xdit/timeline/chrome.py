"""Jobs in the trace format of Chrome, for chrome://tracing and ui.perfetto.dev: a process a job, a thread a rank.

Format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from .job import JobReport


def chrome_trace(jobs: Mapping[str, JobReport]) -> dict[str, Any]:
    """The trace as JSON's objects. Steps whose reports list no collectives have their wall time only."""
    events: list[dict[str, Any]] = []
    for number, (title, job) in enumerate(jobs.items()):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": title}})
        for rank in range(len(job.steps[0].reports)):
            name = {"name": f"rank {rank}"}
            events.append({"ph": "M", "name": "thread_name", "pid": number, "tid": rank, "args": name})
            for step, entry in enumerate(job.steps):
                report = entry.reports[rank]
                begin = report["began"] - job.began if "began" in report else entry.begin
                spans = [(f"step {step + 1}", begin, begin + report["seconds"], _counts(report))]
                spans += [*_evaluations(report, job.began), *_collectives(report, job.began)]
                events += [_complete(number, rank, *span) for span in spans]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _counts(report: dict[str, Any]) -> dict[str, Any]:
    names = ("compute_seconds", "communication_seconds", "idle_seconds", "peak_bytes", "bytes_sent")
    return {name: report[name] for name in names if name in report}


def _evaluations(report: dict[str, Any], began: float) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Of a whole run: from where each begins on this rank to where the next one does."""
    marks = [*report.get("evaluations", ()), report.get("began", 0.0) + report["seconds"]]
    for number, (begin, end) in enumerate(pairwise(marks)):
        yield f"evaluation {number + 1}", begin - began, end - began, {}


def _collectives(report: dict[str, Any], began: float) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    for name, axis, begin, end, num_bytes in report.get("events", ()):
        yield name, begin - began, end - began, {"axis": axis, "bytes": num_bytes}


def _complete(pid: int, tid: int, name: str, begin: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    """A complete event: microseconds, from the job's begin."""
    times = {"ts": begin * 1e6, "dur": max(0.0, end - begin) * 1e6}
    return {"ph": "X", "name": name, "cat": "job", "pid": pid, "tid": tid, **times, "args": args}
