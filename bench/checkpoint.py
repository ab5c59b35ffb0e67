"""Random Flux checkpoints of a chosen size, in the single-file layout that ComfyUI users have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxSize:
    """Sizes of a Flux model: hidden must be a multiple of head_dim; depths count blocks."""

    hidden: int = 512
    head_dim: int = 128
    double_blocks: int = 4
    single_blocks: int = 8
    context_dim: int = 64
    pooled_dim: int = 64
    latent_channels: int = 16
    guidance: bool = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the checkpoint with its shape."""
        h, mlp = self.hidden, 4 * self.hidden
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

        linear("img_in", h, 4 * self.latent_channels)
        linear("txt_in", h, self.context_dim)
        embedders = {"time_in": 256, "vector_in": self.pooled_dim}
        if self.guidance:
            embedders["guidance_in"] = 256
        for name, width in embedders.items():
            linear(f"{name}.in_layer", h, width)
            linear(f"{name}.out_layer", h, h)
        for block in range(self.double_blocks):
            for stream in ("img", "txt"):
                name = f"double_blocks.{block}.{stream}"
                linear(f"{name}_mod.lin", 6 * h, h)
                linear(f"{name}_attn.qkv", 3 * h, h)
                linear(f"{name}_attn.proj", h, h)
                shapes[f"{name}_attn.norm.query_norm.scale"] = (self.head_dim,)
                shapes[f"{name}_attn.norm.key_norm.scale"] = (self.head_dim,)
                linear(f"{name}_mlp.0", mlp, h)
                linear(f"{name}_mlp.2", h, mlp)
        for block in range(self.single_blocks):
            name = f"single_blocks.{block}"
            linear(f"{name}.modulation.lin", 3 * h, h)
            linear(f"{name}.linear1", 3 * h + mlp, h)
            linear(f"{name}.linear2", h, h + mlp)
            shapes[f"{name}.norm.query_norm.scale"] = (self.head_dim,)
            shapes[f"{name}.norm.key_norm.scale"] = (self.head_dim,)
        linear("final_layer.adaLN_modulation.1", 2 * h, h)
        linear("final_layer.linear", 4 * self.latent_channels, h)
        return shapes


def random_weights(
    shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Weights that keep activations near unit variance: matrices ~ N(0, 0.5 / columns), norms one, biases small."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        if key.endswith(".scale") or ".ln_" in key:
            weights[key] = torch.ones(shape, dtype=dtype)
        else:
            spread = (0.5 / shape[1]) ** 0.5 if len(shape) == 2 else 0.02
            weights[key] = (torch.randn(shape, generator=generator) * spread).to(dtype)
    return weights


def write_flux(path: Path, size: FluxSize, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a random model to `path` and return it."""
    save_file(random_weights(size.shapes(), dtype=dtype, seed=seed), str(path))
    return path


def random_inputs(
    latent_channels: int, context_dim: int, *, rows: int, columns: int, text_tokens: int, batch: int, seed: int
) -> tuple[dict[str, Tensor], torch.Generator]:
    """What SD3 and PixArt both take: a latent with rows · columns tokens, a time and a text; and what drew them.

    x: [batch, channels, 2 · rows, 2 · columns]; timestep: in ComfyUI's thousandths; context: [batch, text_tokens, dim].
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, latent_channels, 2 * rows, 2 * columns), generator=generator)
    context = torch.randn((batch, text_tokens, context_dim), generator=generator)
    return {"x": x, "timestep": torch.full((batch,), 700.0), "context": context}, generator


def random_call(
    size: FluxSize, *, tokens: int, text_tokens: int = 64, batch: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """The arguments of one call of ComfyUI's Flux model with `tokens` image tokens (a square, or nearly).

    x: [batch, channels, 2 · rows, 2 · columns] with rows · columns = tokens.
    """
    rows = int(tokens**0.5)
    while tokens % rows:
        rows -= 1
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    call = {
        "x": normal(batch, size.latent_channels, 2 * rows, 2 * (tokens // rows)),
        "timestep": torch.full((batch,), 0.7),
        "context": normal(batch, text_tokens, size.context_dim),
        "y": normal(batch, size.pooled_dim),
    }
    if size.guidance:
        call["guidance"] = torch.full((batch,), 3.5)
    return call
