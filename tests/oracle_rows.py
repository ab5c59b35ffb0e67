"""Diffusers' models computing some of their tokens, for the oracle; attention is whatever it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Spans = dict[str, tuple[int, int]]
"""Stream → the first token, and how many."""

Take = Callable[[Tensor, int, int, int], Tensor]
"""(tensor, dim, first, number) → those of its entries."""

STREAMS = {"flux": ("text", "image"), "sd3": ("image", "text"), "pixart": ("image",)}
"""What a model's blocks compute, in the order in which attention joins it. PixArt's text is what it is."""


def copied(x: Tensor, dim: int, first: int, number: int) -> Tensor:
    """A rank's shard is a tensor of its own; kernels round another way where rows don't follow each other."""
    return x.narrow(dim, first, number).contiguous()


def token_counts(model: Any, arguments: dict[str, Any]) -> dict[str, int]:
    """Of each stream, in order."""
    hidden = arguments["hidden_states"]
    image = hidden.shape[1] if model.family.name == "flux" else hidden.shape[-1] * hidden.shape[-2] // 4
    counts = {"text": arguments["encoder_hidden_states"].shape[1], "image": image}
    return {stream: counts[stream] for stream in STREAMS[model.family.name]}


def flux_rows(module: Any, arguments: dict[str, Any], rows: Spans, take: Take) -> Tensor:
    """All but attention works token by token: Flux takes the rows as they are."""
    some = {
        "hidden_states": take(arguments["hidden_states"], 1, *rows["image"]),
        "encoder_hidden_states": take(arguments["encoder_hidden_states"], 1, *rows["text"]),
        "img_ids": take(arguments["img_ids"], 0, *rows["image"]),
        "txt_ids": take(arguments["txt_ids"], 0, *rows["text"]),
    }
    return module(**{**arguments, **some}, return_dict=False)[0]


def sd3_rows(module: Any, arguments: dict[str, Any], rows: Spans, take: Take) -> Tensor:
    """SD3 makes tokens inside: its parts are called here one by one."""
    hidden = take(module.pos_embed(arguments["hidden_states"]), 1, *rows["image"])
    context = module.context_embedder(take(arguments["encoder_hidden_states"], 1, *rows["text"]))
    time = module.time_text_embed(arguments["timestep"], arguments["pooled_projections"])
    for block in module.transformer_blocks:
        context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=time)
    return module.proj_out(module.norm_out(hidden, time))


def pixart_rows(module: Any, arguments: dict[str, Any], rows: Spans, take: Take) -> Tensor:
    """PixArt makes tokens inside too; the text is whole for any rows."""
    hidden = take(module.pos_embed(arguments["hidden_states"]), 1, *rows["image"])
    context = module.caption_projection(arguments["encoder_hidden_states"])
    modulation, time = module.adaln_single(
        arguments["timestep"], arguments.get("added_cond_kwargs"), batch_size=len(hidden), hidden_dtype=hidden.dtype
    )
    for block in module.transformer_blocks:
        hidden = block(hidden, encoder_hidden_states=context, timestep=modulation)
    shift, scale = (module.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
    return module.proj_out(module.norm_out(hidden) * (1 + scale) + shift)


FORWARDS = {"flux": flux_rows, "sd3": sd3_rows, "pixart": pixart_rows}
"""Family → the image tokens among `rows` that come out of the model."""


def latent_of(model: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens to pixels: Flux has a token's channels outermost, SD3 innermost, PixArt beside as many of a variance."""
    square = tokens.reshape(len(tokens), height, width, -1)
    if model.family.name == "flux":
        square = square.unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    else:
        square = square.unflatten(-1, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
    pixels = square.reshape(len(tokens), -1, 2 * height, 2 * width)
    return pixels[:, :4] if model.family.name == "pixart" else pixels
