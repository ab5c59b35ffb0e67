"""The MODEL whose transformer is on a pool, as ComfyUI's memory management and samplers see it."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from comfy_xdit_nodes import skeleton
from comfy_xdit_nodes.checkpoint import Checkpoint
from comfy_xdit_nodes.concurrent_calls import calc_cond_batch
from comfy_xdit_nodes.export import is_copy
from comfy_xdit_nodes.named import name_of
from comfy_xdit_nodes.native.checkpoint import ComfyCheckpoint, comfy_checkpoint, comfy_family
from comfy_xdit_nodes.native.remote import ComfyRemoteModel
from comfy_xdit_nodes.patches import encode_patches, file_key, own_key, param_bytes
from comfy_xdit_nodes.pool import PoolSetting
from comfy_xdit_nodes.refuse import INSTEAD
from comfy_xdit_nodes.remote import Load, RemoteModel
from comfy_xdit_nodes.run import sample_on_pool
from comfy_xdit_nodes.source import checkpoint_of
from comfy_xdit_nodes.whole_run import sample_whole

log = logging.getLogger("comfy_xdit")

KEY = "comfy_xdit"

WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: sample_on_pool,
    WrappersMP.SAMPLER_SAMPLE: sample_whole,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
}

OF_THE_WEIGHTS = frozenset(
    (
        *("model", "size", "parent", "load_device", "offload_device", "weight_inplace_update", "cached_patcher_init"),
        *("backup", "backup_buffers", "object_patches_backup", "hook_backup", "cached_hook_patches", "pinned"),
        *("current_hooks", "is_injected", "is_multigpu_base_clone", "clone_base_uuid"),
        # ComfyUI-GGUF's own.
        *("mmap_released", "named_modules_to_munmap"),
    )
)
"""Attributes of a MODEL that belong to its weights, and to what is done with them now. All others are what nodes
changed on it, in this version of ComfyUI or in a later one, and go with it to the pool."""


class LoadedSize(float):
    """How much of a MODEL ComfyUI takes for loaded: all of it, and more than it ever asks to be freed for other models.

    So it unloads the workers only when it unloads everything (1e30). Taken from the model's size it leaves nothing to
    load: ComfyUI makes no room for weights that it does not hold.
    """

    def __rsub__(self, size: float) -> float:
        return 0.0


LOADED = LoadedSize(1e29)


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL on a pool: patches are sent instead of merged, unloading frees the workers' memory.

    Its `model` is a skeleton that holds no weights. Signatures differ between versions of ComfyUI,
    so overridden methods take what they are given.
    """

    @property
    def setting(self) -> PoolSetting:
        return self.attachments.get(KEY) or PoolSetting()

    def on_pool(self, setting: PoolSetting) -> RemotePatcher:
        """A clone that runs on the pool of `setting`."""
        clone = self.clone()
        _carry(self, clone)
        clone.attachments[KEY] = setting
        return clone

    def clone(self, *args: Any, **kwargs: Any) -> RemotePatcher:
        clone = super().clone(*args, **kwargs)
        # ComfyUI's list of loaded models holds a clone weakly, and turns to its parent when it goes. So that one must
        # be there as long as the model: the first one, not a link of a chain that may be collected as a whole.
        clone.parent = self if self.parent is None else self.parent
        return clone

    def load_message(self) -> Load:
        """What a run of this MODEL needs on the workers."""
        checkpoint: Checkpoint | ComfyCheckpoint = self.model.checkpoint
        cast = self.get_model_object("manual_cast_dtype")
        storage = self.model.get_dtype()
        spelled = own_key if isinstance(checkpoint, ComfyCheckpoint) else file_key
        return Load(
            model=checkpoint.load(storage=storage, compute=cast or storage, balance=self.setting.balance),
            patches_id=str(self.patches_uuid) if self.patches else "",
            # Of the patches, not of this MODEL: the run keeps it, and must not keep what it runs for.
            patches=partial(encode_patches, self.patches, spelled),
            param_bytes=(
                # Patches on a quantised weight leave it quantised.
                checkpoint.network.param_bytes
                if isinstance(checkpoint, ComfyCheckpoint)
                else param_bytes(self.model, self.patches, storage, cast or storage)
            ),
        )

    def loaded_size(self) -> float:
        return LOADED

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def partially_load(self, *args: Any, **kwargs: Any) -> int:
        super().unpatch_model(None, unpatch_weights=False)
        self.patch_model(load_weights=False)
        self.model.device = self.load_device
        return 0

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load: the run sends the model and its patches."""

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> float:
        # The host holds nothing that could be freed; without this ComfyUI would unload the workers instead.
        return memory_to_free

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.model.device = self.offload_device
            self.model.residency.unload()

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        raise ValueError(
            "this MODEL's weights are on the pool; connect the merging or saving node to the MODEL "
            "in front of Parallel Model (xDiT)"
        )


def from_checkpoint(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> RemotePatcher:
    """A MODEL made from a file's header.

    dtype: what the workers keep the weights in; None chooses as the stock loader does.
    """
    return _patcher(skeleton.config_from_header(checkpoint, dtype=dtype), checkpoint, RemoteModel())


def from_header(config: Any, checkpoint: ComfyCheckpoint) -> RemotePatcher:
    """A MODEL of ComfyUI's own class on the workers, as `open_header` found it."""
    return _patcher(config, checkpoint, ComfyRemoteModel(checkpoint.family))


def parallelize(patcher: Any, setting: PoolSetting | None = None) -> RemotePatcher:
    """The MODEL on a pool, with all that other nodes added to it; `patcher` itself stays as it is.

    setting: None keeps the pool of a MODEL that is on one already, else means the default pool.
    Raises ValueError when the model can't run on a pool.
    """
    if isinstance(patcher, RemotePatcher):
        return patcher if setting is None else patcher.on_pool(setting)
    # On the loaded model itself: clones with other LoRA share it, and it goes when the model goes.
    root = getattr(patcher.model, KEY, None)
    if root is not None and not root.model.checkpoint.is_current():
        log.info("the file of a loaded MODEL was changed or removed; its weights go to the workers from memory")
        root.model.residency.unload()
        root = None
    if root is None:
        root = _patcher(skeleton.config_of(patcher.model), *_origin(patcher))
        setattr(patcher.model, KEY, root)
    ours = root.clone()
    _carry(patcher, ours)
    _wrap(ours)
    ours.attachments[KEY] = setting or PoolSetting()
    return ours


def _origin(patcher: Any) -> tuple[Checkpoint | ComfyCheckpoint, RemoteModel]:
    """Where the workers get a loaded MODEL from, and what takes its calls there."""
    checkpoint: Checkpoint | ComfyCheckpoint
    family = comfy_family(patcher)
    if family is None:
        remote = RemoteModel()
        checkpoint = checkpoint_of(patcher, remote)
    else:
        remote = ComfyRemoteModel(family)
        checkpoint = comfy_checkpoint(patcher, family, remote)
    if is_copy(checkpoint.path):
        # Nobody will load it again, but the workers' maps keep its memory.
        remote.residency.ends_with(remote)
    return checkpoint, remote


def _carry(patcher: Any, ours: RemotePatcher) -> None:
    """Give `ours` a copy of all that nodes changed on `patcher`. Raises ValueError for what would break it."""
    # A clone has copies, but not what a node hung on the MODEL itself.
    for name, value in (vars(patcher) | vars(patcher.clone())).items():
        if name in OF_THE_WEIGHTS:
            continue
        if name in vars(RemotePatcher):
            raise ValueError(f"the pool can't run a MODEL with another {name!r} ({name_of(value)}){INSTEAD}")
        setattr(ours, name, value)


def _patcher(config: Any, checkpoint: Checkpoint | ComfyCheckpoint, remote: RemoteModel) -> RemotePatcher:
    model = skeleton.build(config, checkpoint.meta, remote)
    model.checkpoint = checkpoint
    model.residency = remote.residency
    patcher = RemotePatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    _wrap(patcher)
    return patcher


def _wrap(patcher: RemotePatcher) -> None:
    for kind, wrapper in WRAPPERS.items():
        patcher.remove_wrappers_with_key(kind, KEY)
        patcher.add_wrapper_with_key(kind, KEY, wrapper)
