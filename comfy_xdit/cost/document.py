"""The table of xDiT's documentation (November 2024), in its own symbols and as numbers.

p: tokens; hs: hidden size; L: layers; P: parameters; N: devices; M: patches; A: the size of one of attention's
query, key, value and output. It counts the order of a cost, so that the factor (N - 1) / N of real collectives
is left out, and text tokens too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A method's line of the table: formulas as text, and elements sent by each device for p · hs, L, N."""

    keys_values: str
    communication: str
    parameters: str
    activations: str
    buffers: str
    overlapped: bool
    elements: Callable[[int, int, int], float]
    """(p · hs, L, N) → elements that a device sends in one evaluation."""
    exact_part: str
    """Why ours differs."""


TABLE: dict[str, Entry] = {
    "tensor": Entry(
        keys_values="fresh",
        communication="4 O(p hs) L",
        parameters="P / N",
        activations="2 A / N = QO / N",
        buffers="2 A / N = KV / N",
        overlapped=False,
        elements=lambda p_hs, layers, n: 4 * p_hs * layers,
        exact_part="an all-reduce sends (N - 1) / N of it; blocks with one sum instead of two send half",
    ),
    "distri": Entry(
        keys_values="stale",
        communication="2 O(p hs) L",
        parameters="P",
        activations="2 A / N = QO / N",
        buffers="2 A L = (KV) L",
        overlapped=True,
        elements=lambda p_hs, layers, n: 2 * p_hs * layers,
        exact_part="a rank sends its own keys and values to N - 1 others: (N - 1) / N of it",
    ),
    "ring": Entry(
        keys_values="fresh",
        communication="2 O(p hs) L",
        parameters="P",
        activations="2 A / N = QO / N",
        buffers="2 A / N = KV / N",
        overlapped=True,
        elements=lambda p_hs, layers, n: 2 * p_hs * layers,
        exact_part="N - 1 of N blocks pass through a rank: (N - 1) / N of it",
    ),
    "ulysses": Entry(
        keys_values="fresh",
        communication="4 / N O(p hs) L",
        parameters="P",
        activations="2 A / N = QO / N",
        buffers="2 A / N = KV / N",
        overlapped=False,
        elements=lambda p_hs, layers, n: 4 * p_hs * layers / n,
        exact_part="a rank keeps one part in N: (N - 1) / N of it",
    ),
    "pipe": Entry(
        keys_values="stale-",
        communication="2 O(p hs)",
        parameters="P / N",
        activations="2 A / M = QO / M",
        buffers="2 A L / N = (KV) L / N",
        overlapped=True,
        elements=lambda p_hs, layers, n: 2 * p_hs,
        exact_part="it counts sending and receiving: a stage sends one of the two, and the last sends the image only",
    ),
}
"""cfg and dp work between images and are not in the table."""


def bytes_sent(method: str, *, tokens: int, hidden: int, layers: int, degree: int, element_bytes: int) -> float:
    """What the document's formula gives for one evaluation of one row. KeyError for methods not in the table."""
    return TABLE[method].elements(tokens * hidden, layers, degree) * element_bytes
