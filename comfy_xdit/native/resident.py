"""A model of ComfyUI's own class that a rank holds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.messages import LoadModel, SetPatches
from comfy_xdit.parallel.spec import ModelShape, ParallelSpec, WeightShare

from .families import family_of
from .family import ComfyFamily
from .input_scales import require_whole_inputs, scaled_by_all
from .load import Mine
from .stage import keep_share


class ComfyModel:
    """What a rank holds of `message`, ready to run (`parallel.model.Model`).

    module: the transformer. compute_dtype: what its inputs must be. num_channels: of its output, if it is one latent.
    share: this rank's part; no other weights are read. stage: its blocks, numbered through the plan's lists.
    Raises InputError where ComfyUI finds another model in the file than the host did, and for a class without a plan.
    """

    shape: ModelShape
    stage: range

    def __init__(self, message: LoadModel, device: torch.device, share: WeightShare) -> None:
        from .load import load
        from .patches import WeightPatches

        assert message.source is not None
        family = family_of(message.source.kind)
        if family is None:
            raise InputError(f"the workers have no plan for {message.source.kind}; sample it without the pool")
        self.key = message.model
        self.family: ComfyFamily = family

        def part(net: nn.Module) -> Mine:
            self.shape = family.shape(net)
            self.stage, mine = keep_share(net, family, share)
            return mine

        try:
            loaded = load(message.path, message.source, device, part)
        except InputError as error:
            raise InputError(f"{os.path.basename(message.path)}: {error}") from None
        self._model, self._addresses = loaded.model, loaded.addresses
        self._patches = WeightPatches(loaded, device)
        self.module: nn.Module = self._model.diffusion_model
        # What a class does around `_forward` the host does: wrappers; scales of its latents, if it is told no others.
        if not family.scales:
            self.module.forward = getattr(self.module, "_forward", self.module.forward)
        self.compute_dtype: torch.dtype = self._model.get_dtype_inference()
        self._scaled_by_all = scaled_by_all(self.module)
        self.num_channels: int = self._model.latent_format.latent_channels

    def require_whole_inputs(self, spec: ParallelSpec) -> None:
        """Raises InputError where under `spec` it would compute otherwise than on one rank."""
        require_whole_inputs(self.family.title, self._scaled_by_all, spec)

    def set_patches(self, message: SetPatches) -> int:
        """As `WeightPatches.set`."""
        return self._patches.set(message)

    @property
    def patches_id(self) -> str:
        return self._patches.id

    @property
    def misfits(self) -> list[list[str]]:
        return self._patches.misfits

    @property
    def num_patched(self) -> int:
        return self._patches.num_patched

    def bytes_held(self) -> dict[str, int]:
        """Bytes of the weights here: in the map ("mapped", shared by all processes) and elsewhere ("private")."""
        mapped, private = 0, {}
        for tensor in self._plain():
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._addresses:
                mapped += tensor.nbytes
            else:
                private[storage.data_ptr()] = storage.nbytes()
        return {"mapped": mapped, "private": sum(private.values())}

    def _plain(self) -> Iterator[Tensor]:
        """All weights and buffers; a quantised one as the tensors that it is made of."""
        net = self._model.diffusion_model
        for tensor in (*net.parameters(), *net.buffers()):
            yield from plain_tensors(tensor)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
