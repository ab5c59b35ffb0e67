"""Tiny random checkpoints in the layouts that users have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def flux_shapes(
    *,
    heads: int = 2,
    head_dim: int = 16,
    depth: int = 2,
    depth_single: int = 2,
    context: int = 24,
    vec: int = 20,
    channels: int = 16,
    out_channels: int = 16,
    guidance: bool = True,
) -> Shapes:
    """Flux in the layout of Black Forest Labs. channels: of the latent, times the four pixels of a patch."""
    hidden = heads * head_dim
    shapes = _linear("img_in", hidden, channels) | _linear("txt_in", hidden, context)
    for name, width in (("time_in", 256), ("vector_in", vec)) + ((("guidance_in", 256),) if guidance else ()):
        shapes |= _linear(f"{name}.in_layer", hidden, width) | _linear(f"{name}.out_layer", hidden, hidden)
    for i in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= _linear(f"{block}_mod.lin", 6 * hidden, hidden)
            shapes |= _linear(f"{block}_attn.qkv", 3 * hidden, hidden)
            shapes |= {f"{block}_attn.norm.{x}_norm.scale": (head_dim,) for x in ("query", "key")}
            shapes |= _linear(f"{block}_attn.proj", hidden, hidden)
            shapes |= _linear(f"{block}_mlp.0", 4 * hidden, hidden) | _linear(
                f"{block}_mlp.2", hidden, 4 * hidden
            )
    for i in range(depth_single):
        block = f"single_blocks.{i}"
        shapes |= _linear(f"{block}.modulation.lin", 3 * hidden, hidden)
        shapes |= _linear(f"{block}.linear1", 7 * hidden, hidden) | _linear(
            f"{block}.linear2", hidden, 5 * hidden
        )
        shapes |= {f"{block}.norm.{x}_norm.scale": (head_dim,) for x in ("query", "key")}
    shapes |= _linear("final_layer.linear", out_channels, hidden)
    return shapes | _linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)


def sd3_shapes(
    *,
    heads: int = 2,
    depth: int = 3,
    context: int = 24,
    vec: int = 20,
    channels: int = 4,
    side: int = 12,
    qk_norm: bool = True,
    dual: tuple[int, ...] = (0,),
) -> Shapes:
    """SD3 in Stability's layout: heads of 64 channels; dual: its layers with two attentions (3.5 medium)."""
    hidden = 64 * heads
    shapes: Shapes = {
        "pos_embed": (1, side * side, hidden),
        "x_embedder.proj.weight": (hidden, channels, 2, 2),
    }
    shapes |= {"x_embedder.proj.bias": (hidden,)} | _linear("context_embedder", hidden, context)
    for name, width in (("t_embedder", 256), ("y_embedder", vec)):
        shapes |= _linear(f"{name}.mlp.0", hidden, width) | _linear(f"{name}.mlp.2", hidden, hidden)
    for i in range(depth):
        is_last = i == depth - 1
        for part in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{part}"
            is_image = part == "x_block"
            chunks = (9 if i in dual else 6) if is_image else (2 if is_last else 6)
            shapes |= _linear(f"{block}.adaLN_modulation.1", chunks * hidden, hidden)
            for attn in ("attn", "attn2") if is_image and i in dual else ("attn",):
                shapes |= _linear(f"{block}.{attn}.qkv", 3 * hidden, hidden)
                if qk_norm:
                    shapes |= {f"{block}.{attn}.{x}.weight": (64,) for x in ("ln_q", "ln_k")}
                if is_image or not is_last:
                    shapes |= _linear(f"{block}.{attn}.proj", hidden, hidden)
            if is_image or not is_last:
                shapes |= _linear(f"{block}.mlp.fc1", 4 * hidden, hidden)
                shapes |= _linear(f"{block}.mlp.fc2", hidden, 4 * hidden)
    shapes |= _linear("final_layer.linear", 4 * channels, hidden)
    return shapes | _linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)


def pixart_shapes(
    *,
    heads: int = 2,
    depth: int = 3,
    context: int = 24,
    channels: int = 4,
    alpha: bool = False,
    positions: int | None = None,
    null_tokens: int | None = 9,
) -> Shapes:
    """PixArt in its authors' layout: heads of 72 channels; alpha: with embedders of the picture's size.

    positions: on a side of the table that some files have; null_tokens: of the text that stands for no prompt.
    """
    hidden = 72 * heads
    shapes: Shapes = {"x_embedder.proj.weight": (hidden, channels, 2, 2), "x_embedder.proj.bias": (hidden,)}
    embedders = {"t": hidden} | ({"csize": hidden // 3, "ar": hidden // 3} if alpha else {})
    for name, width in embedders.items():
        shapes |= _linear(f"{name}_embedder.mlp.0", width, 256) | _linear(f"{name}_embedder.mlp.2", width, width)
    shapes |= _linear("t_block.1", 6 * hidden, hidden)
    shapes |= _linear("y_embedder.y_proj.fc1", hidden, context) | _linear("y_embedder.y_proj.fc2", hidden, hidden)
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {f"{block}.scale_shift_table": (6, hidden)}
        shapes |= _linear(f"{block}.attn.qkv", 3 * hidden, hidden) | _linear(f"{block}.attn.proj", hidden, hidden)
        shapes |= _linear(f"{block}.cross_attn.q_linear", hidden, hidden)
        shapes |= _linear(f"{block}.cross_attn.kv_linear", 2 * hidden, hidden)
        shapes |= _linear(f"{block}.cross_attn.proj", hidden, hidden)
        shapes |= _linear(f"{block}.mlp.fc1", 4 * hidden, hidden) | _linear(f"{block}.mlp.fc2", hidden, 4 * hidden)
    shapes |= _linear("final_layer.linear", 8 * channels, hidden) | {"final_layer.scale_shift_table": (2, hidden)}
    shapes |= {"y_embedder.y_embedding": (null_tokens, context)} if null_tokens else {}
    return shapes | ({"pos_embed": (1, positions**2, hidden)} if positions else {})


def picture(family: str, size: tuple[int, int]) -> tuple[int, int]:
    """A latent's size that the family takes, for one that Flux takes: PixArt has no positions for small ones."""
    height, width = size
    if family != "pixart":
        return size
    height += height % 2
    return height, max(width + width % 2, 68 - height)


def random_weights(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a size that keeps activations near one, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1 and key != "pos_embed":
            value *= 0.7 / value[0].numel() ** 0.5
        else:
            value = 0.1 * value + (1.0 if "norm" in key or ".ln_" in key else 0.0)
        weights[key] = value.to(dtype)
    return weights


def write(
    path: Path, weights: dict[str, Tensor], *, prefix: str = "", others: dict[str, Tensor] | None = None
) -> str:
    """A safetensors file of the weights under `prefix`, beside `others`; returns its path."""
    save_file(
        {prefix + key: value.contiguous() for key, value in weights.items()} | (others or {}), str(path)
    )
    return str(path)


def all_in_one(path: Path, weights: dict[str, Tensor]) -> str:
    """The checkpoint as a whole: the transformer beside a VAE and text encoders."""
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    return write(path, weights, prefix="model.diffusion_model.", others=others)
