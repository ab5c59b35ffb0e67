"""Random PixArt checkpoints of a chosen size, in the single-file layout that ComfyUI users have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from comfy_xdit.models.pixart import HEAD_DIM

from .checkpoint import random_inputs, random_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixArtSize:
    """Sizes of a PixArt Sigma."""

    heads: int
    blocks: int
    context_dim: int = 64
    latent_channels: int = 4

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the checkpoint with its shape."""
        h, mlp = self.heads * HEAD_DIM, 4 * self.heads * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

        shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (h, self.latent_channels, 2, 2), (h,)
        linear("t_embedder.mlp.0", h, 256)
        linear("t_embedder.mlp.2", h, h)
        linear("t_block.1", 6 * h, h)
        linear("y_embedder.y_proj.fc1", h, self.context_dim)
        linear("y_embedder.y_proj.fc2", h, h)
        for block in range(self.blocks):
            name = f"blocks.{block}"
            shapes[f"{name}.scale_shift_table"] = (6, h)
            linear(f"{name}.attn.qkv", 3 * h, h)
            linear(f"{name}.attn.proj", h, h)
            linear(f"{name}.cross_attn.q_linear", h, h)
            linear(f"{name}.cross_attn.kv_linear", 2 * h, h)
            linear(f"{name}.cross_attn.proj", h, h)
            linear(f"{name}.mlp.fc1", mlp, h)
            linear(f"{name}.mlp.fc2", h, mlp)
        shapes["final_layer.scale_shift_table"] = (2, h)
        linear("final_layer.linear", 8 * self.latent_channels, h)
        return shapes


def write_pixart(path: Path, size: PixArtSize) -> Path:
    """Write a random model to `path` and return it."""
    save_file(random_weights(size.shapes()), str(path))
    return path


def pixart_call(
    size: PixArtSize, *, rows: int, columns: int, text_tokens: int, batch: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """The arguments of one call of ComfyUI's PixArt model with rows · columns image tokens, 33 sides together or more.

    x: [batch, channels, 2 · rows, 2 · columns].
    """
    sizes = {"rows": rows, "columns": columns, "text_tokens": text_tokens, "batch": batch}
    return random_inputs(size.latent_channels, size.context_dim, **sizes, seed=seed)[0]
