"""Jobs as files that people open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .chrome import chrome_trace
from .job import JobReport
from .picture import timeline


def write(jobs: Mapping[str, JobReport], trace: Path, picture: Path) -> None:
    """Write jobs by their titles as a Chrome trace, and as a picture. Raises OSError when it can't."""
    trace.write_text(json.dumps(chrome_trace(jobs)))
    timeline(jobs).save(picture)
