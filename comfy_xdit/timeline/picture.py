"""A picture of what each rank did when, from the reports that the workers give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageDraw

from .job import JobReport

WIDTH, LEFT, ROW, GAP, TOP = 1000, 150, 18, 14, 40
COMPUTE, TALK, IDLE, LINE = (44, 98, 207), (240, 147, 43), (214, 214, 214), (20, 20, 20)


def timeline(jobs: Mapping[str, JobReport]) -> Image.Image:
    """One band for each job, in it one row for each rank: computing and communicating, in every step.

    A line marks where a step, or a whole run's evaluation, begins on the rank.
    Where the reports list every collective, each is drawn in its place; else what alternates many times in a
    step is drawn as its shares. What is left white is the way from the client to the workers and back, and
    waiting there.
    """
    height = TOP + sum(len(job.steps[0].reports) * ROW + GAP for job in jobs.values()) + 24
    picture = Image.new("RGB", (LEFT + WIDTH + 30, height), "white")
    pen = ImageDraw.Draw(picture)
    legend = ((0, COMPUTE, "computing"), (110, TALK, "communicating"), (230, IDLE, "waiting for other ranks"))
    for x, colour, text in ((LEFT + x, colour, text) for x, colour, text in legend):
        pen.rectangle((x, 10, x + 14, 22), fill=colour)
        pen.text((x + 20, 10), text, fill="black")
    scale = WIDTH / max(job.seconds for job in jobs.values())
    top = TOP
    for title, job in jobs.items():
        pen.text((6, top), title, fill="black")
        for rank in range(len(job.steps[0].reports)):
            _rank(pen, job, rank, top, scale)
            top += ROW
        top += GAP
    _axis(pen, top, scale)
    return picture


def _rank(pen: ImageDraw.ImageDraw, job: JobReport, rank: int, top: int, scale: float) -> None:
    pen.text((LEFT - 46, top + 2), f"rank {rank}", fill="black")
    for step in job.steps:
        report = step.reports[rank]
        for begin, end, colour in _spans(report, step.begin, job.began):
            if end > begin:
                pen.rectangle(
                    (LEFT + begin * scale, top + 2, LEFT + end * scale, top + ROW - 3), fill=colour
                )
        for mark in (step.begin, *(begin - job.began for begin in report.get("evaluations", ()))):
            pen.line((LEFT + mark * scale, top, LEFT + mark * scale, top + ROW - 1), fill=LINE)


def _spans(report: dict[str, Any], begin: float, began: float) -> Iterator[tuple[float, float, tuple[int, int, int]]]:
    """(begin, end, colour), in seconds of the job; a later one is drawn over an earlier one."""
    if "events" in report:
        start = report["began"] - began
        yield start, start + report["seconds"], COMPUTE
        for name, _, first, last, num_bytes in report["events"]:
            # Nothing is sent while a stage waits for its neighbour's tensor.
            yield first - began, last - began, IDLE if name == "p2p" and not num_bytes else TALK
        return
    for part, colour in (("compute", COMPUTE), ("communication", TALK), ("idle", IDLE)):
        seconds = float(report[f"{part}_seconds"])
        yield begin, begin + seconds, colour
        begin += seconds


def _axis(pen: ImageDraw.ImageDraw, top: int, scale: float) -> None:
    """Seconds, at a round distance that leaves room for the numbers."""
    tick = next(size for size in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if size * scale >= 60)
    second = 0.0
    while second * scale <= WIDTH:
        pen.line((LEFT + second * scale, top, LEFT + second * scale, top + 5), fill="black")
        pen.text((LEFT + second * scale - 6, top + 7), f"{second:g} s", fill="black")
        second += tick
