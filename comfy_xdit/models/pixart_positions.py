"""PixArt's positions as ComfyUI has them: diffusers computes them too, from other numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .pixart_call import STEP, scale


class PatchesWithPositions(nn.Module):
    """[batch, channels, height, width] → [batch, tokens, hidden]. interpolation: None for what suits the picture."""

    def __init__(self, proj: nn.Module, interpolation: int | None) -> None:
        super().__init__()
        self.proj: Any = proj
        self.interpolation = interpolation

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.kernel_size[0]
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return tokens + positions(tokens, x.shape[-2] // patch, x.shape[-1] // patch, patch, self.interpolation)


def positions(like: Tensor, rows: int, columns: int, patch: int, interpolation: int | None) -> Tensor:
    """[rows · columns, hidden], in the dtype and on the device of `like`: [..., hidden].

    In that dtype from the start, as in ComfyUI: in a narrow one the angles of far tokens are rough.
    """
    steps = scale(rows * patch, columns * patch)
    reach, density = steps * STEP // patch, interpolation or steps
    hidden = like.shape[-1]
    numbers = torch.arange(hidden // 4, device=like.device, dtype=like.dtype) / (hidden / 4)
    frequencies = 1.0 / 10000**numbers

    def waves(count: int) -> Tensor:
        places = torch.arange(count, device=like.device, dtype=like.dtype) / (count / reach) / density
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    across = waves(columns)[None].expand(rows, -1, -1)
    down = waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], -1).flatten(0, 1)
