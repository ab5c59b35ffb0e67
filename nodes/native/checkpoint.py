"""A loaded MODEL whose own class of ComfyUI's runs on the workers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from comfy_xdit_nodes.native import gguf
from comfy_xdit_nodes.native.export import WAY_OUT, export
from comfy_xdit_nodes.native.gguf_pack import ops_of
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.source import describe, load_message
from torch import Tensor

from comfy_xdit.cost.arithmetic import Network
from comfy_xdit.errors import InputError
from comfy_xdit.messages import LoadModel
from comfy_xdit.native.families import family_of
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.native.network import network_of
from comfy_xdit.native.resident import plain_tensors
from comfy_xdit.parallel.spec import BALANCES, ModelShape
from comfy_xdit.weights.stamp import stamp

OF_DIFFUSERS = ("PixArtAlpha", "PixArtSigma")
"""Kinds that diffusers' classes compute as long as their weights are plain: there also under tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComfyCheckpoint:
    """The file that the workers load a MODEL from, and what ComfyUI made of it.

    message: makes it resident, but for its degrees. config: of the transformer, as ComfyUI detected it. network: what
    its cost depends on. num_dims: of its latent. is_quantised: whether a layer is. meta: key → tensor without numbers.
    """

    whose: ClassVar[str] = " (ComfyUI's class)"
    way_out: ClassVar[str] = WAY_OUT

    message: LoadModel
    family: ComfyFamily
    shape: ModelShape
    network: Network
    config: dict[str, Any]
    num_dims: int
    is_quantised: bool
    meta: dict[str, Tensor]

    @property
    def path(self) -> str:
        return self.message.path

    def is_current(self) -> bool:
        """Whether the file is there, and nobody has written to it or replaced it since."""
        try:
            return stamp(self.path) == self.message.stamp
        except (InputError, OSError):
            return False

    def load(self, *, storage: torch.dtype, compute: torch.dtype, balance: str = BALANCES[0]) -> LoadModel:
        """The message that makes it resident.

        storage: not looked at, ComfyUI has chosen it. compute: as ComfyUI chose it, or a node on the MODEL.
        Raises ValueError for another one of a quantised model: ComfyUI then computes with other operations.
        """
        source = self.message.source
        assert source is not None
        name = str(compute).removeprefix("torch.")
        if name == self.message.compute_dtype:
            return dataclasses.replace(self.message, balance=balance)
        if self.is_quantised:
            raise ValueError(
                f"the pool can't compute in {name} with a quantised {self.family.title}, which is made for "
                f"{self.message.compute_dtype}; remove the node ModelComputeDtype"
            )
        cast = dataclasses.replace(source, cast="" if name == source.dtype else name)
        return dataclasses.replace(load_message(self.path, cast, self.message.stamp), balance=balance)


def comfy_family(patcher: Any) -> ComfyFamily | None:
    """Of a loaded MODEL whose own class runs on the workers; None where diffusers' class is to run it."""
    return family_here(type(patcher.model.model_config).__name__, is_quantised(patcher.model))


def family_here(kind: str, is_quantised: bool) -> ComfyFamily | None:
    """Of models of ComfyUI's configuration class `kind`; None as of `comfy_family`."""
    if use_comfy() is None or (kind in OF_DIFFUSERS and not is_quantised):
        return None
    return family_of(kind)


def comfy_checkpoint(patcher: Any, family: ComfyFamily, owner: Any) -> ComfyCheckpoint:
    """The file of a loaded MODEL for its own class on the workers.

    Its own file where that has its weights, else a copy in shared memory that lives as long as `owner`; there are no
    copies of GGUF files. Raises ValueError when the workers can't have its weights.
    """
    model = patcher.model
    net = model.diffusion_model
    # Not of its state_dict, where a quantised weight has another shape.
    weights = dict([*net.named_parameters(), *net.named_buffers()])
    is_gguf = ops_of(model.model_config) is not None
    message = gguf.describe(patcher) if is_gguf else describe(patcher) or export(patcher, owner)
    shape = family.shape(net, is_quantised=is_quantised(model))
    kept = sum(part.nbytes for weight in net.parameters() for part in plain_tensors(weight))
    return ComfyCheckpoint(
        message=message,
        family=family,
        shape=shape,
        network=network_of(family, net, shape, latent_channels=model.latent_format.latent_channels, kept_bytes=kept),
        config=model.model_config.unet_config,
        num_dims=model.latent_format.latent_dimensions + 2,
        is_quantised=is_quantised(model),
        meta={key: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for key, weight in weights.items()},
    )


def is_quantised(model: Any) -> bool:
    """Whether a layer keeps its weights in another way than as plain numbers."""
    weights = model.diffusion_model.parameters()
    return any(type(weight.data) is not Tensor for weight in weights)
