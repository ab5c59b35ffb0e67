"""What becomes of an error on a rank: its kind, and a sentence for the user."""

from __future__ import annotations

from comfy_xdit.errors import InputError, is_out_of_memory
from comfy_xdit.quoted import quoted

MAX_CHARS = 8000
"""Of an error's own text. torch lists every key of a state that doesn't fit, and a line has its limit."""


def classify(error: BaseException, rank: int) -> tuple[str, str]:
    """A failure's kind, as in `messages.Failure`, and its sentence for the user."""
    text = quoted(error)
    if len(text) > MAX_CHARS:
        text = f"{text[:MAX_CHARS]}…"
    if is_out_of_memory(error):
        detail = f" ({text.split('. ')[0]})" if text else ""
        return "memory", (
            f"worker {rank} ran out of memory{detail}; use a smaller image or batch, more devices, "
            "fp8 weights, or unload other models"
        )
    if isinstance(error, InputError):
        return "input", text
    return "fault", f"worker {rank} failed: {type(error).__name__}: {text}"
