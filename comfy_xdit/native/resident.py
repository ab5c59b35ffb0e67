"""A model of ComfyUI's own class that a rank holds, and one evaluation of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.messages import LoadModel, SetPatches, Tuple
from comfy_xdit.parallel.spec import ParallelSpec


class ComfyModel:
    """What a rank holds of `message`, ready to run.

    patches_id: always that of none; misfits: always empty; stage: no block is told apart.
    """

    stage = range(0)

    def __init__(self, message: LoadModel, device: torch.device) -> None:
        from .load import load

        assert message.source is not None
        self.key = message.model
        self.kind = message.source.kind
        self.patches_id = ""
        self.misfits: list[list[str]] = []
        self.num_patched = 0
        try:
            self._model, self._addresses = load(message.path, message.source, device)
        except InputError as error:
            raise InputError(f"{os.path.basename(message.path)}: {error}") from None

    def denoise(self, call: dict[str, Any]) -> Any:
        """What the transformer gives for one call: a tensor, or a list of them, one for each kind of latent.

        call: x, timestep and the named arguments, exactly as ComfyUI's model passes them to its transformer.
        """
        # A new dict: models write into it.
        named = {name: _tuples(value) for name, value in call.items() if name not in ("x", "timestep")}
        options = dict(named.pop("transformer_options", None) or {})
        given = (_tuples(call["x"]), _tuples(call["timestep"]))
        output = self._model.diffusion_model(*given, transformer_options=options, **named)
        return output if isinstance(output, Tensor) else list(output)

    def set_patches(self, message: SetPatches) -> int:
        """Raises InputError for any patch."""
        if message.patches:
            raise InputError(f"the pool can't patch (LoRA) a {self.kind} of ComfyUI's own class; remove the patches")
        return 0

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


def require_one_rank(spec: ParallelSpec, world_size: int) -> None:
    """Raises InputError, naming the degrees, for a spec of more than one rank, or a pool of more."""
    if spec.num_ranks > 1:
        raise InputError(f"a model of ComfyUI's own class runs on one rank, not with {spec}; use a pool of one device")
    if world_size > 1:
        raise InputError(
            f"a model of ComfyUI's own class runs on one rank, and the pool has {world_size}; use a pool of one device"
        )


def _tuples(value: Any) -> Any:
    """`value` with its `Tuple`s made Python's: some models ask whether a timestep is one."""
    if isinstance(value, Tuple):
        return tuple(_tuples(item) for item in value.items)
    if isinstance(value, list):
        return [_tuples(item) for item in value]
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
