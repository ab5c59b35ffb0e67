"""The MODEL whose transformer is on a pool, as ComfyUI's memory management and samplers see it."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from comfy_xdit_nodes import skeleton
from comfy_xdit_nodes.checkpoint import Checkpoint
from comfy_xdit_nodes.patches import encode_patches
from comfy_xdit_nodes.pool import PoolSetting
from comfy_xdit_nodes.remote import Load, RemoteModel
from comfy_xdit_nodes.run import sample_on_pool
from comfy_xdit_nodes.source import checkpoint_of
from comfy_xdit_nodes.together import calc_cond_batch
from comfy_xdit_nodes.whole_run import sample_whole

from comfy_xdit.messages import Patch

KEY = "comfy_xdit"

LOADED_BYTES = 1e29
"""More than ComfyUI ever asks to be freed for other models, less than "unload all models" asks for (1e30)."""

WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: sample_on_pool,
    WrappersMP.SAMPLER_SAMPLE: sample_whole,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
}

CARRIED = (
    *("patches", "patches_uuid", "object_patches", "weight_wrapper_patches", "model_options"),
    *("force_cast_weights", "attachments", "additional_models", "callbacks", "wrappers", "injections"),
    *("skip_injection", "hook_patches", "hook_patches_backup", "forced_hooks", "hook_mode", "is_clip"),
)
"""What nodes change on a MODEL, apart from its weights."""


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL on a pool: patches are sent instead of merged, unloading frees the workers' memory.

    Its `model` is a skeleton that holds no weights. Signatures differ between versions of ComfyUI,
    so overridden methods take what they are given.
    """

    @property
    def setting(self) -> PoolSetting:
        return self.attachments.get(KEY) or PoolSetting()

    def on_pool(self, setting: PoolSetting | None) -> RemotePatcher:
        """A clone that runs on the pool of `setting`; None keeps the one it has."""
        clone = self.clone()
        if setting is not None:
            clone.attachments[KEY] = setting
        return clone

    def load_message(self) -> Load:
        """What a run of this MODEL needs on the workers."""
        checkpoint: Checkpoint = self.model.checkpoint
        cast = self.get_model_object("manual_cast_dtype")
        storage = self.model.get_dtype()
        return Load(
            model=checkpoint.load(storage=storage, compute=cast or storage, balance=self.setting.balance),
            patches_id=str(self.patches_uuid) if self.patches else "",
            patches=self.encoded_patches,
        )

    def encoded_patches(self) -> list[Patch]:
        return encode_patches(self.patches)

    def model_size(self) -> int:
        return 1

    def loaded_size(self) -> float:
        return LOADED_BYTES if self.model.remote.is_resident() else 0

    def current_loaded_device(self) -> torch.device:
        # Never the device that ComfyUI loads to: it would subtract `loaded_size` from what others need there.
        return skeleton.META

    def partially_load(self, *args: Any, **kwargs: Any) -> int:
        super().unpatch_model(None, unpatch_weights=False)
        self.patch_model(load_weights=False)
        return 0

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load: the run sends the model and its patches."""

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> float:
        # The host holds nothing that could be freed; without this ComfyUI would unload the workers instead.
        return memory_to_free

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.model.remote.unload()

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


def parallelize(patcher: Any, setting: PoolSetting | None = None) -> RemotePatcher:
    """The MODEL on a pool, with all that other nodes added to it; `patcher` itself stays as it is.

    setting: None keeps the pool of a MODEL that is on one already, else means the default pool.
    Raises ValueError when the model can't run on a pool.
    """
    if isinstance(patcher, RemotePatcher):
        return patcher.on_pool(setting)
    # On the loaded model itself: clones with other LoRA share it, and it goes when the model goes.
    root = getattr(patcher.model, KEY, None)
    if root is None:
        remote = RemoteModel()
        checkpoint = checkpoint_of(patcher, remote)
        root = _patcher(skeleton.config_of(patcher.model), checkpoint, remote)
        setattr(patcher.model, KEY, root)
    ours = root.clone()
    theirs = patcher.clone()
    for name in CARRIED:
        setattr(ours, name, getattr(theirs, name))
    _wrap(ours)
    return ours.on_pool(setting or PoolSetting())


def _patcher(config: Any, checkpoint: Checkpoint, remote: RemoteModel) -> RemotePatcher:
    model = skeleton.build(config, checkpoint.meta, remote)
    model.checkpoint = checkpoint
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
