"""Rows over everything that ever was, rewritten over the little that is still held.

A traced sampler gives each of its tensors as a row over the start and all answers so far. Summed as
it is, a row of step 40 would need 40 old latents. But samplers carry a state: the new row is a
multiple of the last input or few, plus recent answers. Which ones, is found by least squares.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from .trajectory import Row

MAX_WINDOW = 8
"""How many calls back a state is looked for; the host's longest multistep sampler needs 4."""

TOLERANCE = 1e-10
"""Of a row's largest coefficient: below it two float64 rows are the same."""


MAX_WEIGHT = 4.0
"""Of an input in a row: larger ones only cancel with others, and multiply the rounding of what is held in fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A term of the traced rows. born: the number of calls answered when it appeared; None: constant."""

    term: str
    born: int | None


class History:
    """Finds short rows. `inputs` grows by one row with each call, in order."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._terms = [column.term for column in columns]
        self._born = np.array([-1 if column.born is None else column.born for column in columns])
        self._constant = self._born < 0
        self._inputs: list[np.ndarray] = []

    def add_input(self, row: np.ndarray) -> None:
        """Remember the row of the next call's input, to be used as "x0", "x1", …"""
        self._inputs.append(row)

    def shorten(self, row: np.ndarray) -> Row:
        """`row` over the fewest and latest terms, exact to 1e-10. The given row itself if none is found.

        Small weights go before few terms.
        """
        limit = TOLERANCE * np.abs(row).max(initial=0.0)
        windows = range(min(MAX_WINDOW, len(self._inputs)))
        for most, constants_too, window in itertools.product((MAX_WEIGHT, np.inf), (False, True), windows):
            # Born with the answers of the calls in the window, or drawn since: may be added directly.
            recent = self._born >= len(self._inputs) - window
            old = ~(recent | self._constant) if constants_too else ~recent
            for used, weights in self._solutions(row, old, window, limit):
                if np.abs(weights).max(initial=0.0) > most:
                    continue
                rest = row - sum((w * self._inputs[i] for i, w in zip(used, weights, strict=True)), 0.0)
                short = {f"x{i}": float(w) for i, w in zip(used, weights, strict=True)}
                return short | self._named(np.where(old, 0.0, rest), limit)
        return self._named(row, 0.0)

    def _solutions(
        self, row: np.ndarray, old: np.ndarray, window: int, limit: float
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Sets of inputs in the window that make up the row's old part, smallest first."""
        if np.abs(row[old]).max(initial=0.0) <= limit:
            yield (), np.zeros(0)
        latest = range(len(self._inputs) - 1, len(self._inputs) - 2 - window, -1)
        if _fit(self._inputs, tuple(latest), row, old, limit) is None:
            return
        for size in range(1, window + 2):
            for used in itertools.combinations(latest, size):
                weights = _fit(self._inputs, used, row, old, limit)
                if weights is not None:
                    yield used, weights

    def _named(self, row: np.ndarray, limit: float) -> Row:
        return {self._terms[j]: float(row[j]) for j in np.flatnonzero(np.abs(row) > limit * 1e-2)}


def _fit(
    inputs: list[np.ndarray], used: tuple[int, ...], row: np.ndarray, old: np.ndarray, limit: float
) -> np.ndarray | None:
    """Weights that make `row` out of the used inputs on its old columns, or None."""
    basis = np.stack([inputs[i][old] for i in used], axis=1)
    weights = np.linalg.lstsq(basis, row[old], rcond=None)[0]
    off = np.abs(basis @ weights - row[old]).max(initial=0.0)
    return weights if off <= limit else None
