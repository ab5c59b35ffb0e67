"""What the workers did when in one sampling run, as files in ComfyUI's output folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths

from comfy_xdit import messages as m

log = logging.getLogger("comfy_xdit")

PREFIX = "comfy-xdit/trace"
"""Below ComfyUI's output folder; numbers and endings follow."""


class Record:
    """Has every job of a run traced, and keeps what its ranks report.

    call_all: of the pool, with ComfyUI's interruption.
    """

    def __init__(self, call_all: Callable[..., list[m.Result]]) -> None:
        self._call_all = call_all
        self._reports: list[list[dict[str, Any]]] = []
        self._title = ""

    def call(self, message: m.Denoise | m.Sample, **options: Any) -> m.Result:
        """Rank 0's result, as the pool's own `call`."""
        results = self._call_all(dataclasses.replace(message, trace=True), **options)
        self._title = self._title or str(message.spec)
        self._reports.append([result.report for result in results])
        return results[0]

    def write(self) -> None:
        """Two files: a Chrome trace and a picture. A failure is only logged: the image is there already."""
        if not self._reports:
            return
        # Here: pictures need Pillow, and runs without a record don't.
        from comfy_xdit.timeline.files import write
        from comfy_xdit.timeline.job import JobReport

        try:
            folder, name, number, *_ = folder_paths.get_save_image_path(PREFIX, folder_paths.get_output_directory())
            trace, picture = (Path(folder) / f"{name}_{number:05}_{ending}" for ending in (".json", ".png"))
            write({self._title: JobReport.of(self._reports)}, trace, picture)
        except OSError as error:
            log.warning("what the workers did could not be written: %s", error)
            return
        log.info("what the workers did when: %s (for chrome://tracing) and %s", trace, picture.name)
