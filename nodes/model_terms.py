"""What the host does to the network's input and output at a noise level, as three numbers.

EPS, V prediction, flow, EDM: each scales the latent before the network sees it, and mixes it with
what comes out. The numbers are read off by trying, whatever the class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIMIT = 1e-5
"""Of the largest value: how well the three numbers must predict a second try (float32 on the host)."""


def model_terms(model_sampling: Any, sigma: float, device: torch.device) -> dict[str, float]:
    """input_scale, skip, gain and timestep at `sigma`.

    The network gets input_scale · x and the timestep; denoised = skip · x + gain · its output.
    Raises ValueError when the host's model sampling is no such thing.
    """
    sigmas = torch.full((1,), sigma, dtype=torch.float32, device=device)

    def tensor(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).reshape(1, 1, 1, -1)

    scaled = model_sampling.calculate_input(sigmas, tensor(1.0, -3.0, 0.0))
    denoised = model_sampling.calculate_denoised(
        sigmas, tensor(0.0, 1.0, -2.0, 0.0), tensor(1.0, 0.0, 0.5, 0.0)
    )
    scale = float(scaled[..., 0])
    skip, gain = float(denoised[..., 0]), float(denoised[..., 1])
    found = torch.cat([scaled, denoised], dim=-1)
    expected = tensor(scale, -3.0 * scale, 0.0, skip, gain, 0.5 * skip - 2.0 * gain, 0.0)
    off = (found - expected).abs().max()
    if not off <= LIMIT * expected.abs().max():
        raise ValueError(f"{type(model_sampling).__name__} does not just scale and mix at sigma {sigma:g}")
    timestep = float(model_sampling.timestep(sigmas).float().reshape(-1)[0])
    return {"input_scale": scale, "skip": skip, "gain": gain, "timestep": timestep}
