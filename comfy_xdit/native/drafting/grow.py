"""A call with more tokens of one stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.native.subject import Call

BESIDE = {"image": ("denoise_mask", "vace_context", "time_dim_concat"), "text": ("attention_mask", "txt_mask")}
"""Arguments that have the sizes of the latent, or of the text."""

MORE_PIXELS, MORE_WORDS, MORE_SOUND = 12, 33, 3
"""Past the next multiple of 32 tokens, to which some models pad."""


def growths(call: Call) -> Iterator[tuple[str, Call]]:
    """(stream, a call with more of it), for each dim along which a latent may be larger."""
    x = call["x"]
    image = x[0] if isinstance(x, list) else x
    for dim in range(2, image.ndim):
        back = dim - image.ndim
        more = MORE_PIXELS if back >= -2 else 1
        larger = _more(image, back, more)
        named = {name: _more(call[name], back, more) for name in BESIDE["image"] if _fits(call.get(name), image, back)}
        steps = call["timestep"]
        if back == -3 and isinstance(steps, Tensor) and steps.ndim == 2 and steps.shape[1] == image.shape[dim]:
            named["timestep"] = _more(steps, 1, more)
        yield "image", {**call, **named, "x": [larger, *x[1:]] if isinstance(x, list) else larger}
    if isinstance(x, list) and len(x) > 1:
        for dim in range(2, x[1].ndim):
            yield "audio", {**call, "x": [x[0], _more(x[1], dim, MORE_SOUND)]}
    if isinstance(context := call.get("context"), Tensor):
        named = {
            name: _more(call[name], -1, MORE_WORDS)
            for name in BESIDE["text"]
            if isinstance(call.get(name), Tensor) and call[name].shape[-1] == context.shape[1]
        }
        if "num_tokens" in call:
            named["num_tokens"] = call["num_tokens"] + MORE_WORDS
        yield "text", {**call, **named, "context": _more(context, 1, MORE_WORDS)}


def _fits(value: Any, image: Tensor, dim: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= -dim and value.shape[dim] == image.shape[dim]


def _more(x: Tensor, dim: int, num: int) -> Tensor:
    """With `num` entries more along a dim, like the first ones."""
    places = torch.arange(x.shape[dim] + num) % x.shape[dim]
    return x.index_select(dim, places)
