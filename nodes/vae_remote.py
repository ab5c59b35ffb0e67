"""A ComfyUI VAE on a pool: whether it can be there, its weights, its calls, its place in "Unload models"."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.ldm.models.autoencoder as autoencoder
import comfy.model_management
import comfy.sd
import torch
from comfy_xdit_nodes.export import NAMES, export_file, require_reachable
from comfy_xdit_nodes.host_memory import make_room
from comfy_xdit_nodes.patcher import RemotePatcher
from comfy_xdit_nodes.pool import PoolSetting, connect
from comfy_xdit_nodes.remote import poll, use_this_comfyui
from comfy_xdit_nodes.residency import Residency
from torch import Tensor

from comfy_xdit import messages as m
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.vae.layout import VAEConfig, describe
from comfy_xdit.weights.stamp import stamp

if TYPE_CHECKING:
    from comfy_xdit.pool.client import Pool

WAY_OUT = "use ComfyUI's own VAE node"

TYPES = NAMES | {torch.int64: "I64", torch.int32: "I32"}
"""What weights and buffers of a VAE are made of, as safetensors calls it."""

SPLITTABLE = (autoencoder.AutoencoderKL, autoencoder.AutoencodingEngine)


def config_of(vae: Any) -> VAEConfig:
    """What the VAE is, when the workers can split it by rows.

    Raises ValueError, naming what they can't do, for tiny, video and audio VAEs and for changed ones.
    """
    model = vae.first_stage_model
    if type(model) not in SPLITTABLE:
        raise ValueError(f"it is a {type(model).__name__}, not an AutoencoderKL")
    config = describe({key: tuple(weight.shape) for key, weight in vae.get_sd().items()})
    require_unpatched(vae, frozenset(("decode", "encode")), changed_or_padded)
    return config


def changed_or_padded(layer: torch.nn.Module) -> bool:
    """As `changed`, or any padding but zeros, which is all that the split layers do."""
    return changed(layer) or getattr(layer, "padding_mode", "zeros") != "zeros"


def changed(layer: torch.nn.Module) -> bool:
    """Whether something beside its weights was put on a layer: hooks, a new forward, circular padding."""
    own = {"forward", "decode", "encode", "_forward", "_conv_forward"} & vars(layer).keys()
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return bool(own or hooks) or getattr(layer, "padding_mode", "zeros") == "circular"


def require_unpatched(vae: Any, methods: frozenset[str], changed: Callable[[torch.nn.Module], bool]) -> None:
    """Raises ValueError for what nodes do to a VAE beside its weights; methods: of the VAE object, which are called."""
    for name in sorted(methods):
        if getattr(type(vae), name) is not getattr(comfy.sd.VAE, name):
            raise ValueError(f"it is a {type(vae).__module__}.{type(vae).__name__}, with its own {name}")
    if methods & vars(vae).keys() or vae.patcher.patches or vae.patcher.object_patches:
        raise ValueError("another node changed it")
    for name, layer in vae.first_stage_model.named_modules():
        if changed(layer):
            raise ValueError(f"another node changed its {name or 'forward'}")


class NotCarried(Exception):
    """The workers can't have a VAE as ComfyUI's own class, as they found when they made it; it says why."""


class RemoteVAE:
    """One VAE on the workers, as one class, and where it is resident; its weights are in shared memory.

    source: how the workers make ComfyUI's own class of it; None for diffusers' class.
    """

    def __init__(self, vae: Any, source: m.VAESource | None) -> None:
        path, digest = _exported(vae)
        dtype = str(vae.vae_dtype).removeprefix("torch.")
        key = f"vae-{dtype}-{digest}" + (f"-{source.kind}-{source.hash}" if source is not None else "")
        self.load = m.LoadVAE(vae=key, path=path, dtype=dtype, stamp=stamp(path), source=source)
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

    def call(
        self,
        setting: PoolSetting,
        message: m.VAEDecode | m.VAEEncode | m.RunVAE,
        poll_of: Callable[[Pool], Callable[[], Any]] = lambda pool: poll,
    ) -> m.Result:
        """The pool's answer. poll_of: what to call meanwhile.

        Raises NotCarried, PoolError with a sentence, or ComfyUI's interruption.
        """
        pool = connect(setting)
        require_reachable(pool, self.load.path, what="VAE", way_out=f"{WAY_OUT}, or a pool of this machine")
        make_room(pool, self._residency, self.load.vae)
        comfy.model_management.load_models_gpu([self._patcher])
        with pool.lease(poll=poll):
            self._residency.add(pool, self.load.vae)
            if self.load.source is not None:
                use_this_comfyui(pool)
            self._load(pool)
            return pool.call(message, poll=poll_of(pool))

    def _load(self, pool: Pool) -> None:
        try:
            pool.call(self.load, poll=poll)
        except PoolError as error:
            if error.kind != "input" or self.load.source is None:
                raise
            raise NotCarried(str(error)) from None


def _digest(weights: dict[str, Tensor]) -> str:
    """Of names and numbers: a VAE that is loaded twice is resident once."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights.items():
        digest.update(f"{name} {list(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ComfyUI caches VAE objects and hands them from node to node; there is no place of ours on them.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[str | None, RemoteVAE]] = weakref.WeakKeyDictionary()
_files: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


def remote_vae(vae: Any, source: m.VAESource | None = None) -> RemoteVAE:
    """The VAE's stand-in, exported at its first use. Raises ValueError when shared memory is full."""
    of_model = _known.setdefault(vae.first_stage_model, {})
    name = None if source is None else source.hash
    if name not in of_model:
        of_model[name] = RemoteVAE(vae, source)
    return of_model[name]


def _exported(vae: Any) -> tuple[str, str]:
    """The file of its weights, which lives as long as its model, and their digest."""
    model = vae.first_stage_model
    if model not in _files:
        weights = vae.get_sd()
        path = export_file(model, weights, what="VAE", way_out=WAY_OUT, names=TYPES)
        _files[model] = (str(path), _digest(weights))
    return _files[model]
