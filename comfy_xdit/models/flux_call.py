"""Calls of Flux.1: ComfyUI's arguments to diffusers' and back, and where its tokens are cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.tensor_plan import TensorPlan
from comfy_xdit.parallel.tokens import Attention, Blocks, Rule, TokenPlan, Tokens

from .base import Call, Config
from .latent import check_channels, check_pooled, cropped, padded, rows

PATCH = 2
"""Latent pixels on a side of one token."""

DOUBLE = "transformer_blocks.*."
SINGLE = "single_transformer_blocks.*."

BOTH = ("text", "image")
STREAMS: dict[str, Rule] = {
    "hidden_states": Tokens(("image",)),
    "encoder_hidden_states": Tokens(("text",)),
    "image_rotary_emb": Tokens(BOTH, dim=0),
}
GIVES = ("encoder_hidden_states", "hidden_states")

PLAN = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks",
            takes=STREAMS,
            gives=GIVES,
            light=("ff_context.", "attn.add_", "attn.to_add_out."),
            once=("norm1.", "norm1_context."),
        ),
        Blocks(path="single_transformer_blocks", takes=STREAMS, gives=GIVES, once=("norm.",)),
    ),
    attention={
        "transformer_blocks.*.attn": Attention(BOTH, seam="diffusers"),
        "single_transformer_blocks.*.attn": Attention(BOTH, seam="diffusers"),
    },
    join={"proj_out": Tokens(("image",))},
    untouched=True,
    tensor=TensorPlan(
        columns=(
            *(f"{DOUBLE}attn.to_{x}" for x in "qkv"),
            *(f"{DOUBLE}attn.add_{x}_proj" for x in "qkv"),
            DOUBLE + "ff.net.0.proj",
            DOUBLE + "ff_context.net.0.proj",
            *(f"{SINGLE}attn.to_{x}" for x in "qkv"),
            SINGLE + "proj_mlp",
        ),
        joined=(DOUBLE + "norm1.linear", DOUBLE + "norm1_context.linear", SINGLE + "norm.linear"),
        rows={
            DOUBLE + "attn.to_out.0": (1,),
            DOUBLE + "attn.to_add_out": (1,),
            DOUBLE + "ff.net.2": (1,),
            DOUBLE + "ff_context.net.2": (1,),
            SINGLE + "proj_out": (1, 4),  # attention beside the mlp
        },
        heads=(DOUBLE + "attn", SINGLE + "attn"),
    ),
)


def inputs(config: Config, call: Call) -> dict[str, Any]:
    """Arguments of `FluxTransformer2DModel.forward`. InputError for what it cannot do."""
    x, batch = call["x"], call["x"].shape[0]
    context = rows(call["context"], batch)
    check_channels(
        "Flux.1",
        latent=x.shape[1],
        text=context.shape[-1],
        wanted_latent=config["in_channels"] // PATCH**2,
        wanted_text=config["joint_attention_dim"],
    )
    for reference in call.get("ref_latents") or []:
        if reference.ndim != 4 or reference.shape[1] != x.shape[1]:
            raise InputError(
                f"a reference latent of shape {list(reference.shape)} does not fit this Flux.1, which takes "
                f"[batch, {x.shape[1]}, height, width]; encode the picture with the VAE that belongs to the model"
            )
    images, ids = [tokens(x)], [token_ids(x)]
    for reference, place in zip(call.get("ref_latents") or [], reference_places(call), strict=True):
        images.append(rows(tokens(reference), batch))
        ids.append(token_ids(reference, *place))
    pooled = call.get("y")
    if pooled is None:
        pooled = x.new_zeros((1, config["pooled_projection_dim"]))
    check_pooled("Flux.1", pooled.shape[1], config["pooled_projection_dim"], may_be_wider=True)
    arguments: dict[str, Any] = {
        "hidden_states": torch.cat(images, 1),
        "encoder_hidden_states": context,
        "pooled_projections": rows(pooled[:, : config["pooled_projection_dim"]], batch),
        "timestep": rows(call["timestep"], batch),
        # fp32 whatever the latent's dtype: positions above 256 are not all in bfloat16.
        "img_ids": torch.cat(ids),
        "txt_ids": torch.zeros((context.shape[1], 3), device=x.device),
        "guidance": guidance(config, call),
    }
    mask = call.get("attention_mask")
    if mask is not None:
        num_tokens = context.shape[1] + arguments["hidden_states"].shape[1]
        if mask.shape[-1] != num_tokens or mask.shape[-2] not in (1, num_tokens):
            raise InputError(f"an attention mask of {list(mask.shape)} is none for Flux.1's {num_tokens} tokens")
        mask = mask if mask.dim() == 2 else mask.unsqueeze(1)
        arguments["joint_attention_kwargs"] = {"attention_mask": mask}
    if call.get("control") is not None:
        raise InputError("Flux.1 on a pool takes no ControlNet yet; remove the ControlNet node")
    return arguments


def output(out: Tensor, call: Call) -> Tensor:
    """[batch, tokens, channels · 4] → [batch, channels, height, width] of x; reference tokens are dropped."""
    height, width = grid(call["x"])
    image = out[:, : height * width].unflatten(1, (height, width)).unflatten(-1, (-1, PATCH, PATCH))
    return cropped(image.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3), call["x"])


def output_channels(config: Config, call: Call) -> int:
    """Models that are given more than a latent, as for filling, put out its channels only."""
    return int(config["out_channels"] or config["in_channels"]) // PATCH**2


def guidance(config: Config, call: Call) -> Tensor | None:
    """ComfyUI passes guidance to every Flux.1; only some have a weight for it."""
    if not config["guidance_embeds"]:
        return None
    if call.get("guidance") is None:
        raise InputError("this Flux.1 needs a guidance value; remove FluxDisableGuidance or add FluxGuidance")
    return rows(call["guidance"], call["x"].shape[0])


def grid(x: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return -(-x.shape[-2] // PATCH), -(-x.shape[-1] // PATCH)


def tokens(x: Tensor) -> Tensor:
    """[batch, channels, height, width] → [batch, tokens, channels · 4], channel by channel."""
    height, width = grid(x)
    patches = padded(x, PATCH).unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def token_ids(x: Tensor, index: int = 0, top: int = 0, left: int = 0) -> Tensor:
    """[tokens, 3] in fp32: image index, row, column. top, left: in latent pixels, rounded up to tokens."""
    height, width = grid(x)
    ids = torch.zeros((height, width, 3), device=x.device)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(height, device=x.device)[:, None] + -(-top // PATCH)
    ids[..., 2] = torch.arange(width, device=x.device)[None] + -(-left // PATCH)
    return ids.flatten(0, 1)


def reference_places(call: Call) -> list[tuple[int, int, int]]:
    """(index, top, left) of each reference latent, by ComfyUI's methods.

    "index": an image of its own each. "uxo": along the diagonal beyond the image. "offset", the default:
    beside or below the ones before, on the shorter side.
    """
    method = call.get("ref_latents_method") or "offset"
    if method == "index_timestep_zero":
        raise InputError(
            f"Flux.1 on a pool knows no {method!r} for reference latents; use offset, index or uxo/uno"
        )
    places = []
    height = width = 0
    for number, reference in enumerate(call.get("ref_latents") or [], start=1):
        own_height, own_width = reference.shape[-2:]
        if method == "index":
            places.append((number, 0, 0))
        elif method == "uxo":
            rows_, columns = grid(call["x"])
            places.append((0, rows_ * PATCH + height, columns * PATCH + width))
            height, width = height + own_height, width + own_width
        else:
            beside = own_height + height > own_width + width
            top, left = (0, width) if beside else (height, 0)
            places.append((1, top, left))
            height, width = max(height, own_height + top), max(width, own_width + left)
    return places
