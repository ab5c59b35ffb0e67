"""Diffusers' models computing some of their tokens, for the oracle; attention is whatever it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    """The parts of a model are called one by one, as its forward does."""
    hidden = module.x_embedder(arguments["hidden_states"])
    context = module.context_embedder(arguments["encoder_hidden_states"])
    numbers = [arguments[name] for name in ("timestep", "guidance") if arguments.get(name) is not None]
    time = module.time_text_embed(*(1000 * x.to(hidden.dtype) for x in numbers), arguments["pooled_projections"])
    places = module.pos_embed(torch.cat([arguments["txt_ids"], arguments["img_ids"]]))
    (first, number), (first_image, number_image) = rows["text"], rows["image"]
    first_image += context.shape[1]
    own = tuple(torch.cat([take(x, 0, first, number), take(x, 0, first_image, number_image)]) for x in places)
    text, image = take(context, 1, *rows["text"]), take(hidden, 1, *rows["image"])
    for block in (*module.transformer_blocks, *module.single_transformer_blocks):
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time, image_rotary_emb=own)
    return module.proj_out(module.norm_out(placed(image, hidden, rows), time))


def sd3_rows(module: Any, arguments: dict[str, Any], rows: Spans, take: Take) -> Tensor:
    whole, context = module.pos_embed(arguments["hidden_states"]), arguments["encoder_hidden_states"]
    hidden, context = take(whole, 1, *rows["image"]), take(module.context_embedder(context), 1, *rows["text"])
    time = module.time_text_embed(arguments["timestep"], arguments["pooled_projections"])
    for block in module.transformer_blocks:
        context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=time)
    return module.proj_out(module.norm_out(placed(hidden, whole, rows), time))


def pixart_rows(module: Any, arguments: dict[str, Any], rows: Spans, take: Take) -> Tensor:
    """The text is whole for any rows."""
    whole = module.pos_embed(arguments["hidden_states"])
    hidden, context = take(whole, 1, *rows["image"]), module.caption_projection(arguments["encoder_hidden_states"])
    modulation, time = module.adaln_single(
        arguments["timestep"], arguments.get("added_cond_kwargs"), batch_size=len(hidden), hidden_dtype=hidden.dtype
    )
    for block in module.transformer_blocks:
        hidden = block(hidden, encoder_hidden_states=context, timestep=modulation)
    shift, scale = (module.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
    return module.proj_out(module.norm_out(placed(hidden, whole, rows)) * (1 + scale) + shift)


def placed(x: Tensor, like: Tensor, rows: Spans) -> Tensor:
    """The image's `rows` at their places among all."""
    whole = like.new_zeros(like.shape)
    whole[:, rows["image"][0] : sum(rows["image"])] = x
    return whole


FORWARDS = {"flux": flux_rows, "sd3": sd3_rows, "pixart": pixart_rows}
"""Family → all image tokens that come out of the model, of which those among `rows` mean anything. They are taken for
the blocks alone; what is before and after these sees all, and kernels round by their number."""


def latent_of(model: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens to pixels: Flux has a token's channels outermost, SD3 innermost, PixArt beside as many of a variance."""
    square = tokens.reshape(len(tokens), height, width, -1)
    if model.family.name == "flux":
        square = square.unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    else:
        square = square.unflatten(-1, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
    pixels = square.reshape(len(tokens), -1, 2 * height, 2 * width)
    return pixels[:, :4] if model.family.name == "pixart" else pixels
