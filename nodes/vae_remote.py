"""A ComfyUI VAE on a pool: whether it can be there, its weights, its calls, its place in "Unload models"."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import comfy.ldm.models.autoencoder as autoencoder
import comfy.model_management
import comfy.sd
import torch
from comfy_xdit_nodes.export import export_file, require_reachable
from comfy_xdit_nodes.host_memory import make_room
from comfy_xdit_nodes.patcher import RemotePatcher
from comfy_xdit_nodes.pool import PoolSetting, connect
from comfy_xdit_nodes.remote import poll
from comfy_xdit_nodes.residency import Residency
from torch import Tensor

from comfy_xdit import messages as m
from comfy_xdit.vae.layout import VAEConfig, describe
from comfy_xdit.weights.stamp import stamp

WAY_OUT = "use ComfyUI's own VAE node"

SPLITTABLE = (autoencoder.AutoencoderKL, autoencoder.AutoencodingEngine)


def config_of(vae: Any) -> VAEConfig:
    """What the VAE is, when the workers can do all that it does.

    Raises ValueError, naming what they can't do, for tiny, video and audio VAEs and for changed ones.
    """
    if type(vae).decode is not comfy.sd.VAE.decode or type(vae).encode is not comfy.sd.VAE.encode:
        raise ValueError(f"it is a {type(vae).__module__}.{type(vae).__name__}, with its own decode or encode")
    model = vae.first_stage_model
    if type(model) not in SPLITTABLE:
        raise ValueError(f"it is a {type(model).__name__}, not an AutoencoderKL")
    config = describe({key: tuple(weight.shape) for key, weight in vae.get_sd().items()})
    if {"decode", "encode"} & vars(vae).keys() or vae.patcher.patches or vae.patcher.object_patches:
        raise ValueError("another node changed it")
    for name, layer in model.named_modules():
        if _changed(layer):
            raise ValueError(f"another node changed its {name or 'forward'}")
    return config


def _changed(layer: torch.nn.Module) -> bool:
    """Whether something beside its weights was put on a layer: hooks, a new forward, circular padding."""
    own = {"forward", "decode", "encode", "_forward", "_conv_forward"} & vars(layer).keys()
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return bool(own or hooks) or getattr(layer, "padding_mode", "zeros") != "zeros"


class RemoteVAE:
    """The weights of one VAE in shared memory, and where they are resident."""

    def __init__(self, vae: Any, config: VAEConfig) -> None:
        weights = vae.get_sd()
        path = export_file(vae.first_stage_model, weights, what="VAE", way_out=WAY_OUT)
        dtype = str(vae.vae_dtype).removeprefix("torch.")
        self.config = config
        key = f"vae-{dtype}-{_digest(weights)}"
        self.load = m.LoadVAE(vae=key, path=str(path), dtype=dtype, stamp=stamp(str(path)))
        self._residency = Residency("VAE")
        self._residency.ends_with(vae.first_stage_model)
        # ComfyUI's "Unload models" goes through what its memory management has on its list.
        holder = torch.nn.Module()
        holder.residency = self._residency  # type: ignore[assignment]
        self._patcher = RemotePatcher(
            holder,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.vae_offload_device(),
        )

    def call(self, setting: PoolSetting, message: m.VAEDecode | m.VAEEncode) -> Tensor:
        """The pool's answer. Raises PoolError with a sentence, or ComfyUI's interruption."""
        pool = connect(setting)
        require_reachable(pool, self.load.path, what="VAE", way_out=f"{WAY_OUT}, or a pool of this machine")
        make_room(pool, self._residency, self.load.vae)
        comfy.model_management.load_models_gpu([self._patcher])
        with pool.lease(poll=poll):
            self._residency.add(pool, self.load.vae)
            pool.call(self.load, poll=poll)
            return pool.call(message, poll=poll).value


def _digest(weights: dict[str, Tensor]) -> str:
    """Of names and numbers: a VAE that is loaded twice is resident once."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights.items():
        digest.update(f"{name} {list(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ComfyUI caches VAE objects and hands them from node to node; there is no place of ours on them.
_known: weakref.WeakKeyDictionary[torch.nn.Module, RemoteVAE] = weakref.WeakKeyDictionary()


def remote_vae(vae: Any, config: VAEConfig) -> RemoteVAE:
    """The VAE's stand-in, exported at its first use. Raises ValueError when shared memory is full."""
    model = vae.first_stage_model
    remote = _known.get(model)
    if remote is None:
        remote = _known[model] = RemoteVAE(vae, config)
    return remote
