"""A picture of what each rank did when, from the reports that the workers give."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .sampling import Job

WIDTH, LEFT, ROW, GAP, TOP = 1000, 150, 18, 14, 40
COMPUTE, TALK, LINE = (44, 98, 207), (240, 147, 43), (200, 200, 200)


def timeline(jobs: dict[str, Job]) -> Image.Image:
    """One band for each job, in it one row for each rank: computing and communicating, in every step.

    Within a step the two alternate many times; they are drawn as their shares. What is left white is the way
    from the client to the workers and back, and waiting there.
    """
    height = TOP + sum(len(job.steps[0].reports) * ROW + GAP for job in jobs.values()) + 24
    picture = Image.new("RGB", (LEFT + WIDTH + 30, height), "white")
    pen = ImageDraw.Draw(picture)
    for x, colour, text in ((LEFT, COMPUTE, "computing"), (LEFT + 110, TALK, "communicating with other ranks")):
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


def _rank(pen: ImageDraw.ImageDraw, job: Job, rank: int, top: int, scale: float) -> None:
    pen.text((LEFT - 46, top + 2), f"rank {rank}", fill="black")
    for step in job.steps:
        report = step.reports[rank]
        talk = float(report.get("communication_seconds", 0.0))
        begin = step.begin * scale + LEFT
        between = begin + max(report["seconds"] - talk, 0.0) * scale
        end = begin + report["seconds"] * scale
        pen.rectangle((begin, top + 2, between, top + ROW - 3), fill=COMPUTE)
        if talk:
            pen.rectangle((between, top + 2, end, top + ROW - 3), fill=TALK)
        pen.line((begin, top, begin, top + ROW - 1), fill=LINE)


def _axis(pen: ImageDraw.ImageDraw, top: int, scale: float) -> None:
    """Seconds, at a round distance that leaves room for the numbers."""
    tick = next(size for size in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if size * scale >= 60)
    second = 0.0
    while second * scale <= WIDTH:
        pen.line((LEFT + second * scale, top, LEFT + second * scale, top + 5), fill="black")
        pen.text((LEFT + second * scale - 6, top + 7), f"{second:g} s", fill="black")
        second += tick
