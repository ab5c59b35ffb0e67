"""Calls of PixArt: ComfyUI's arguments to diffusers' and back, and where its tokens are cut.

Blocks take the text as it is and return the image alone. So only the image is a stream: every rank holds the
whole text, and attends to it without asking another.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.tensor_plan import TensorPlan
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

from .base import Call, Config
from .latent import check_channels, rows

BLOCK = "transformer_blocks.*."

LATENT_PIXEL = 8
"""Pixels of the picture on a side of one of the latent."""

STEP = 512 // LATENT_PIXEL
"""Positions are scaled in steps of 512 pixels, as sides of the latent."""

IMAGE = ("image",)

PLAN = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks",
            takes={"hidden_states": Tokens(IMAGE)},
            gives=("hidden_states",),
            once=("scale_shift_table", "attn2.to_k.", "attn2.to_v."),
        ),
    ),
    attention={BLOCK + "attn1": Attention(IMAGE, seam="diffusers")},
    join={"proj_out": Tokens(IMAGE)},
    untouched=True,
    # The one modulation of all blocks is a hundredth of the weights: whole on every rank.
    tensor=TensorPlan(
        columns=(
            *(f"{BLOCK}attn1.to_{x}" for x in "qkv"),
            *(f"{BLOCK}attn2.to_{x}" for x in "qkv"),
            BLOCK + "ff.net.0.proj",
        ),
        joined=(),
        rows={BLOCK + "attn1.to_out.0": (1,), BLOCK + "attn2.to_out.0": (1,), BLOCK + "ff.net.2": (1,)},
        heads=(BLOCK + "attn1", BLOCK + "attn2"),
    ),
)


def inputs(config: Config, call: Call) -> dict[str, Any]:
    """Arguments of `PixArtTransformer2DModel.forward`; InputError for what ComfyUI's own model cannot do either.

    Like ComfyUI's it looks at every token of the text, and at no mask.
    """
    x, batch = call["x"], call["x"].shape[0]
    check_channels(
        "PixArt",
        latent=x.shape[1],
        text=call["context"].shape[-1],
        wanted_latent=config["in_channels"],
        wanted_text=config["caption_channels"],
    )
    if call.get("control") is not None:
        raise InputError("PixArt on a pool takes no ControlNet yet; remove the ControlNet node")
    height, width = x.shape[-2:]
    check_size(height, width, config["patch_size"])
    arguments: dict[str, Any] = {
        "hidden_states": x,
        "encoder_hidden_states": rows(call["context"], batch),
        "timestep": rows(call["timestep"], batch),
    }
    if config["use_additional_conditions"]:
        sizes = {"resolution": call.get("c_size"), "aspect_ratio": call.get("c_ar")}
        latents = {"resolution": [height * LATENT_PIXEL, width * LATENT_PIXEL], "aspect_ratio": [height / width]}
        arguments["added_cond_kwargs"] = {
            name: rows(x.new_tensor([latents[name]]) if size is None else size, batch) for name, size in sizes.items()
        }
    return arguments


def output(out: Tensor, call: Call) -> Tensor:
    """The noise, without its variance: the first half of the channels."""
    return out[:, : call["x"].shape[1]]


def output_channels(config: Config, call: Call) -> int:
    return int(call["x"].shape[1])


def check_size(height: int, width: int, patch: int) -> None:
    """Raises InputError for sides of a latent that PixArt has no tokens or no positions for."""
    if height % patch or width % patch:
        raise InputError(
            f"a latent of {width}x{height} does not divide into PixArt's patches; "
            f"use multiples of {patch * LATENT_PIXEL} pixels on each side"
        )
    if scale(height, width) == 0:
        raise InputError(
            f"a latent of {width}x{height} is too small for PixArt's positions; "
            f"use {(STEP + 2) * LATENT_PIXEL} pixels or more, both sides together"
        )


def scale(height: int, width: int) -> int:
    """How many times 512 pixels a latent's sides are on average: ComfyUI places positions by it."""
    return round((height + width) // 2 / STEP)
