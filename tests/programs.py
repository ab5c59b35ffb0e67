"""Sampler programs written out by hand, as the host's tracing would give them."""

from __future__ import annotations

import torch

from comfy_xdit.trajectory import SamplerCall, SamplerPreview, SamplerProgram


def flow_program(*, steps: int, cfg: float = 1.0, kind: str = "euler", noisy: bool = False) -> SamplerProgram:
    """Euler or two-step multistep on a flow model, from sigma 1 to 0; noisy adds fresh noise in each step.

    With cfg the calls have two conditionings, "positive" and "negative".
    """
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    calls, previews = [], []
    row = {"noise": 1.0}
    for i, sigma in enumerate(sigmas[:-1]):
        guide = {"0": cfg, "1": 1.0 - cfg} if cfg != 1 else {"0": 1.0}
        calls.append(
            SamplerCall(
                sigma=sigma, timestep=sigma, input=row, known={}, input_scale=1.0, skip=1.0, gain=-sigma,
                conds=[0, 1] if cfg != 1 else [0], guide=guide,
            )
        )
        previews.append(SamplerPreview(after=i, step=i + 1, total=steps, denoised={f"d{i}": 1.0}))
        kept = sigmas[i + 1] / sigma
        row = {f"x{i}": kept, f"d{i}": 1.0 - kept}
        if kind == "multistep" and i:
            row = {f"x{i}": kept, f"d{i}": 1.5 * (1.0 - kept), f"d{i - 1}": -0.5 * (1.0 - kept)}
        if noisy and i + 1 < steps:
            row[f"n{i}"] = 0.1
    conds = ["positive", "negative"] if cfg != 1 else ["positive"]
    return SamplerProgram(conds=conds, calls=calls, previews=previews, output=row)
