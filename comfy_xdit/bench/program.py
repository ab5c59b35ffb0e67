"""Euler's method as a program for the workers, for benchmarks that have no ComfyUI."""

from __future__ import annotations

from itertools import pairwise

from comfy_xdit.trajectory import SamplerCall, SamplerPreview, SamplerProgram


def euler(num_steps: int, *, cfg: float | None = None) -> SamplerProgram:
    """Of a model that predicts noise minus image, from noise level 1 to 0 in even steps.

    cfg: the guidance of "positive" over "negative", which are then evaluated side by side; None: "positive" alone.
    """
    levels = [1 - step / num_steps for step in range(num_steps)] + [0.0]
    conds = ["positive"] if cfg is None else ["positive", "negative"]
    guide = {"0": 1.0} if cfg is None else {"0": cfg, "1": 1 - cfg}
    calls, previews = [], []
    state = {"noise": 1.0}
    for number, (level, lower) in enumerate(pairwise(levels)):
        calls.append(
            SamplerCall(
                sigma=level,
                timestep=level,
                input=state,
                known={},
                input_scale=1.0,
                skip=1.0,
                gain=-level,
                conds=list(range(len(conds))),
                guide=guide,
            )
        )
        previews.append(
            SamplerPreview(after=number, step=number + 1, total=num_steps, denoised={f"d{number}": 1.0})
        )
        state = {f"x{number}": lower / level, f"d{number}": 1 - lower / level}
    return SamplerProgram(conds=conds, calls=calls, previews=previews, output=state)
