"""Random SD3 checkpoints of a chosen size, in the single-file layout that ComfyUI users have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfy_xdit.models.sd3 import HEAD_DIM

from .checkpoint import random_inputs, random_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SD3Size:
    """Sizes of an SD3.5 medium: in the first `num_dual` blocks the image attends to itself a second time.

    side: of the table of positions.
    """

    heads: int
    blocks: int
    num_dual: int = 1
    context_dim: int = 64
    pooled_dim: int = 64
    latent_channels: int = 16
    side: int = 16

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the checkpoint with its shape."""
        h = self.heads * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, self.side**2, h)}

        def linear(name: str, rows: int, columns: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

        shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (h, self.latent_channels, 2, 2), (h,)
        linear("context_embedder", h, self.context_dim)
        for name, width in (("t_embedder", 256), ("y_embedder", self.pooled_dim)):
            linear(f"{name}.mlp.0", h, width)
            linear(f"{name}.mlp.2", h, h)
        for block in range(self.blocks):
            for part in ("x_block", "context_block"):
                name, is_image = f"joint_blocks.{block}.{part}", part == "x_block"
                is_dual, ends = is_image and block < self.num_dual, not is_image and block + 1 == self.blocks
                linear(f"{name}.adaLN_modulation.1", (9 if is_dual else 2 if ends else 6) * h, h)
                for attention in ("attn", "attn2") if is_dual else ("attn",):
                    linear(f"{name}.{attention}.qkv", 3 * h, h)
                    shapes |= {f"{name}.{attention}.{norm}.weight": (HEAD_DIM,) for norm in ("ln_q", "ln_k")}
                    if not ends:
                        linear(f"{name}.{attention}.proj", h, h)
                if not ends:
                    linear(f"{name}.mlp.fc1", 4 * h, h)
                    linear(f"{name}.mlp.fc2", h, 4 * h)
        linear("final_layer.linear", 4 * self.latent_channels, h)
        linear("final_layer.adaLN_modulation.1", 2 * h, h)
        return shapes


def write_sd3(path: Path, size: SD3Size) -> Path:
    """Write a random model to `path` and return it."""
    save_file(random_weights(size.shapes()), str(path))
    return path


def sd3_call(
    size: SD3Size, *, rows: int, columns: int, text_tokens: int, batch: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """The arguments of one call of ComfyUI's SD3 model with rows · columns image tokens.

    x: [batch, channels, 2 · rows, 2 · columns].
    """
    sizes = {"rows": rows, "columns": columns, "text_tokens": text_tokens, "batch": batch}
    call, generator = random_inputs(size.latent_channels, size.context_dim, **sizes, seed=seed)
    return {**call, "y": torch.randn((batch, size.pooled_dim), generator=generator)}
