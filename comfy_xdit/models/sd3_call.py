"""Calls of SD3 and SD3.5: ComfyUI's arguments to diffusers' and back, and where their tokens are cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.tensor_plan import TensorPlan
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

from .base import Call, Config
from .latent import check_channels, check_pooled, cropped, padded, rows

BLOCK = "transformer_blocks.*."

PLAN = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks",
            takes={"hidden_states": Tokens(("image",)), "encoder_hidden_states": Tokens(("text",))},
            gives=("encoder_hidden_states", "hidden_states"),
            light=("ff_context.", "attn.add_", "attn.to_add_out."),
            once=("norm1.", "norm1_context."),
        ),
    ),
    attention={
        BLOCK + "attn": Attention(("image", "text"), seam="diffusers"),
        BLOCK + "attn2": Attention(("image",), some=True, seam="diffusers"),
    },
    join={"proj_out": Tokens(("image",))},
    untouched=True,
    tensor=TensorPlan(
        columns=(
            *(f"{BLOCK}attn.to_{x}" for x in "qkv"),
            *(f"{BLOCK}attn.add_{x}_proj" for x in "qkv"),
            *(f"{BLOCK}attn2.to_{x}" for x in "qkv"),
            BLOCK + "ff.net.0.proj",
            BLOCK + "ff_context.net.0.proj",
        ),
        joined=(BLOCK + "norm1.linear", BLOCK + "norm1_context.linear"),
        rows={
            BLOCK + "attn.to_out.0": (1,),
            BLOCK + "attn.to_add_out": (1,),
            BLOCK + "attn2.to_out.0": (1,),
            BLOCK + "ff.net.2": (1,),
            BLOCK + "ff_context.net.2": (1,),
        },
        heads=(BLOCK + "attn", BLOCK + "attn2"),
    ),
)


def inputs(config: Config, call: Call) -> dict[str, Any]:
    """Arguments of `SD3Transformer2DModel.forward`; InputError for what it cannot do."""
    x, batch = call["x"], call["x"].shape[0]
    if call.get("y") is None:
        raise InputError("SD3 / SD3.5 needs pooled text beside the tokens; encode the prompt with its text encoders")
    if call.get("control") is not None:
        raise InputError("SD3 / SD3.5 on a pool takes no ControlNet yet; remove the ControlNet node")
    check_channels(
        "SD3 / SD3.5",
        latent=x.shape[1],
        text=call["context"].shape[-1],
        wanted_latent=config["in_channels"],
        wanted_text=config["joint_attention_dim"],
    )
    check_pooled("SD3 / SD3.5", call["y"].shape[1], config["pooled_projection_dim"])
    patch, limit = config["patch_size"], config["pos_embed_max_size"]
    image = padded(x, patch)
    if max(image.shape[-2:]) > limit * patch:
        raise InputError(
            f"a latent of {x.shape[-1]}x{x.shape[-2]} is beyond the table of positions of SD3 / SD3.5; "
            f"use {limit * patch} or less on each side ({limit * patch * 8} pixels)"
        )
    return {
        "hidden_states": image,
        "encoder_hidden_states": rows(call["context"], batch),
        "pooled_projections": rows(call["y"], batch),
        "timestep": rows(call["timestep"], batch),
    }


def output(out: Tensor, call: Call) -> Tensor:
    """The image without the padding of odd sizes."""
    return cropped(out, call["x"])


def output_channels(config: Config, call: Call) -> int:
    return int(config["out_channels"])
