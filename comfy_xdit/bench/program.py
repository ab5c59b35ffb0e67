"""Euler's method as a program for the workers, for benchmarks that have no ComfyUI."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from comfy_xdit.tape import Tape
from comfy_xdit.trajectory import SamplerProgram


def euler(num_steps: int, *, cfg: float | None = None) -> SamplerProgram:
    """Of a model that predicts noise minus image, from noise level 1 to 0 in even steps.

    cfg: the guidance of "positive" over "negative", which are then evaluated side by side; None: "positive" alone.
    """
    levels = [1 - step / num_steps for step in range(num_steps)] + [0.0]
    conds = ["positive"] if cfg is None else ["positive", "negative"]
    tape = Tape()
    x: Tensor = tape.value("noise")
    for number, (level, lower) in enumerate(pairwise(levels)):
        outputs: list[Tensor] = [*tape.call(x, sigma=level, timestep=level, conds=range(len(conds)))]
        velocity = outputs[0] if cfg is None else outputs[1] + cfg * (outputs[0] - outputs[1])
        tape.preview(number + 1, num_steps, x - level * velocity)
        x = x + (lower - level) * velocity
    return tape.program(conds, x)
