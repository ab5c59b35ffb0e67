"""The methods that reuse keys and values, written a second time: one process, a plain diffusers model.

Nothing of the engine's attention, hooks, cuts or pipelines is used here. A model computes some rows of its
tokens; what its attention layers do with keys and values is the caller's, who keeps them in a dict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_xdit.trajectory import Replay

Rows = dict[str, tuple[int, int]]
"""Of "text" and of "image": the first token, and how many."""

Remember = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(number of the layer, fresh k, fresh v, their places in the layer's whole sequence) → k and v to attend to.

All [batch, heads, tokens, head dim]; the places are in the order of the model's streams.
"""

STREAMS = {"flux": ("text", "image"), "sd3": ("image", "text"), "pixart": ("image",)}
"""What a model's blocks compute, in the order in which attention joins it. PixArt's text is what it is."""


def compute(model: Any, arguments: dict[str, Any], rows: Rows | None, remember: Remember) -> Tensor:
    """The model's output tokens [batch, image rows, ...] for `rows` of its tokens, or for all of them.

    arguments: of the diffusers forward, whole.
    """
    kind, module = model.family.name, model.module
    lengths = token_counts(model, arguments)
    rows = rows or {stream: (0, length) for stream, length in lengths.items()}
    order = STREAMS[kind]
    starts = {order[0]: 0, order[-1]: lengths[order[0]] if len(order) > 1 else 0}
    places = torch.cat([torch.arange(rows[s][1]) + rows[s][0] + starts[s] for s in order])

    def keys(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # Of each PixArt block's two attentions the second is to the text.
        return (k, v) if kind == "pixart" and layer % 2 else remember(layer, k, v, places[: k.shape[2]])

    with attention_with(keys):
        return {"flux": flux_rows, "sd3": sd3_rows, "pixart": pixart_rows}[kind](module, arguments, rows)


def token_counts(model: Any, arguments: dict[str, Any]) -> dict[str, int]:
    hidden = arguments["hidden_states"]
    image = hidden.shape[1] if model.family.name == "flux" else hidden.shape[-1] * hidden.shape[-2] // 4
    return {"text": arguments["encoder_hidden_states"].shape[1], "image": image}


def flux_rows(module: Any, arguments: dict[str, Any], rows: Rows) -> Tensor:
    """All but attention works token by token: Flux takes the rows as they are."""
    text, image = (slice(first, first + size) for first, size in (rows["text"], rows["image"]))
    some = {
        "hidden_states": arguments["hidden_states"][:, image],
        "encoder_hidden_states": arguments["encoder_hidden_states"][:, text],
        "img_ids": arguments["img_ids"][image],
        "txt_ids": arguments["txt_ids"][text],
    }
    return module(**{**arguments, **some}, return_dict=False)[0]


def sd3_rows(module: Any, arguments: dict[str, Any], rows: Rows) -> Tensor:
    """SD3 makes tokens inside: its parts are called here one by one."""
    text, image = (slice(first, first + size) for first, size in (rows["text"], rows["image"]))
    hidden = module.pos_embed(arguments["hidden_states"])[:, image]
    context = module.context_embedder(arguments["encoder_hidden_states"][:, text])
    time = module.time_text_embed(arguments["timestep"], arguments["pooled_projections"])
    for block in module.transformer_blocks:
        context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=time)
    return module.proj_out(module.norm_out(hidden, time))


def pixart_rows(module: Any, arguments: dict[str, Any], rows: Rows) -> Tensor:
    """PixArt makes tokens inside too; the text is whole for any rows."""
    first, size = rows["image"]
    hidden = module.pos_embed(arguments["hidden_states"])[:, first : first + size]
    context = module.caption_projection(arguments["encoder_hidden_states"])
    modulation, time = module.adaln_single(
        arguments["timestep"], arguments.get("added_cond_kwargs"), batch_size=len(hidden), hidden_dtype=hidden.dtype
    )
    for block in module.transformer_blocks:
        hidden = block(hidden, encoder_hidden_states=context, timestep=modulation)
    shift, scale = (module.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
    return module.proj_out(module.norm_out(hidden) * (1 + scale) + shift)


@contextlib.contextmanager
def attention_with(keys: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Attention takes its keys and values from `keys(number of the call, fresh k, fresh v)`."""
    plain, count = F.scaled_dot_product_attention, 0

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        nonlocal count
        number, count = count, count + 1
        if not query.shape[2]:
            return query
        assert attn_mask is None, "the oracle knows no masks"
        key, value = keys(number, key, value)
        return plain(query, key, value, **{name: rest[name] for name in ("scale",) if name in rest})

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def pipefusion(
    model: Any, job: dict[str, Any], *, num_patches: int, warmup_steps: int, together: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """What sampling gives when each step computes text, then patch after patch; and the previews.

    job: program, noise, latent, noises, mask, conds. together: cond and uncond are one batch.
    num_patches: already fitting. Keys and values of tokens that a forward doesn't compute are those that were
    computed last with the same conditionings; the first time, all tokens are computed.
    """
    program = job["program"]
    replay = Replay(
        program, noise=job["noise"], latent=job["latent"], noises=job["noises"], mask=job["mask"],
        dtype=job["noise"].dtype,
    )
    kept: dict[Any, list[Tensor]] = {}
    previews = []
    for number, call in enumerate(program.calls):
        x = replay.model_input(number)
        groups = [call.conds] if together else [[index] for index in call.conds]
        outputs: list[Tensor] = []
        for group in groups:
            key = (*call.conds, *group)
            whole = number < warmup_steps or (key, 0) not in kept
            outputs += evaluate(model, x, call.timestep, [job["conds"][i] for i in group], key, kept,
                                0 if whole else num_patches)
        replay.answer(number, outputs)
        previews += [preview.denoised for preview in replay.previews(number)]
    return replay.output(), previews


def evaluate(
    model: Any, x: Tensor, timestep: float, conds: list[dict], key: Any, kept: dict[Any, list[Tensor]], patches: int
) -> list[Tensor]:
    """The model's output for each conditioning; all in one forward when `patches` is 0."""
    call = {name: torch.cat([cond[name].expand(len(x), *cond[name].shape[1:]) for cond in conds]) for name in conds[0]}
    call["x"] = torch.cat([x.to(model.compute_dtype)] * len(conds))
    call["timestep"] = torch.full((len(call["x"]),), timestep)
    arguments = model.family.inputs(dict(model.module.config), call)

    def remember(layer: int, k: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        if patches == 0:
            kept[key, layer] = [k.contiguous().clone(), v.contiguous().clone()]
        for old, fresh in zip(kept[key, layer], (k, v), strict=True):
            old[:, :, places] = fresh
        return kept[key, layer][0], kept[key, layer][1]

    counts = token_counts(model, arguments)
    height, width = -(-x.shape[-2] // 2), -(-x.shape[-1] // 2)
    if patches == 0:
        out = compute(model, arguments, None, remember)[:, : height * width]
    else:
        extra = counts["image"] - height * width
        assert not extra, "the oracle knows no reference images"
        if "text" in STREAMS[model.family.name]:
            compute(model, arguments, {"text": (0, counts["text"]), "image": (0, 0)}, remember)
        parts, first = [], 0
        for lines in torch.arange(height).tensor_split(patches):
            size = len(lines) * width
            parts.append(compute(model, arguments, {"text": (0, 0), "image": (first, size)}, remember))
            first += size
        out = torch.cat(parts, 1)
    return list(latent_of(model, out, height, width)[..., : x.shape[-2], : x.shape[-1]].chunk(len(conds)))


def latent_of(model: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens to pixels: Flux has a token's channels outermost, SD3 innermost, PixArt beside as many of a variance."""
    square = tokens.reshape(len(tokens), height, width, -1)
    if model.family.name == "flux":
        square = square.unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    else:
        square = square.unflatten(-1, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
    pixels = square.reshape(len(tokens), -1, 2 * height, 2 * width)
    return pixels[:, :4] if model.family.name == "pixart" else pixels
