"""Latents as ComfyUI has them to sizes that a patch divides, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from comfy_xdit.errors import InputError


def padded(x: Tensor, patch_size: int) -> Tensor:
    """[batch, channels, height, width] grown to multiples of `patch_size`, wrapped round as in ComfyUI."""
    height, width = (-size % patch_size for size in x.shape[-2:])
    return F.pad(x, (0, width, 0, height), mode="circular") if height or width else x


def cropped(out: Tensor, like: Tensor) -> Tensor:
    """`out` without what `padded` added to `like`."""
    return out[..., : like.shape[-2], : like.shape[-1]]


def rows(value: Tensor, batch: int) -> Tensor:
    """One row for each of the batch, from a tensor that has one for each or one for all."""
    return value.expand(batch, *value.shape[1:])


def check_channels(title: str, *, latent: int, text: int, wanted_latent: int, wanted_text: int) -> None:
    """Raises InputError, naming the way out, for a latent or a text that was made for another model."""
    if latent != wanted_latent:
        raise InputError(
            f"a latent of {latent} channels does not fit this {title}, which takes {wanted_latent}; "
            "use the empty latent node and the VAE that belong to the model"
        )
    if text != wanted_text:
        raise InputError(
            f"text of {text} channels does not fit this {title}, which takes {wanted_text}; "
            "encode the prompt with the text encoders that belong to the model"
        )


def check_pooled(title: str, width: int, wanted: int, *, may_be_wider: bool = False) -> None:
    """Raises InputError for a pooled text of another width. may_be_wider: the model looks at its first numbers."""
    if width < wanted or (width > wanted and not may_be_wider):
        raise InputError(
            f"a pooled text of {width} numbers does not fit this {title}, which takes {wanted}; "
            "encode the prompt with the text encoders that belong to the model"
        )
