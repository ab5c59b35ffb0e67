"""LoRA and its kin on a model of ComfyUI's own class: ComfyUI's own algebra, rounding and seeds, on the worker."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from comfy_xdit.errors import InputError, is_out_of_memory
from comfy_xdit.messages import Patch, SetPatches
from comfy_xdit.quoted import quoted
from comfy_xdit.weights.fit import check_patch, fitting
from comfy_xdit.weights.patches import UNSETTLED

from .load import layer_of

if TYPE_CHECKING:
    import torch

    from .load import Loaded

log = logging.getLogger("comfy_xdit")

PREFIX = "diffusion_model."
"""How the name of a transformer's weight begins in ComfyUI's model: ComfyUI's random rounding has it as its seed."""


class WeightPatches:
    """The patches that a loaded model wears.

    id: of those now worn; "" for none. misfits: [key, why] of each that was left out, alike on every rank.
    """

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.id = ""
        self.misfits: list[list[str]] = []
        self._loaded = loaded
        self._device = device
        self._worn: set[str] = set()
        # In blocks of a GGUF file.
        self._packed: set[str] = set()
        # Weights that the file hasn't got in this form, as they were before they were patched.
        self._before: dict[str, Tensor] = {}

    @property
    def num_patched(self) -> int:
        """How many weights here differ from the file now."""
        return len(self._worn)

    def set(self, message: SetPatches) -> int:
        """Make the model wear exactly these patches; returns how many weights changed.

        Patches of weights that other ranks hold, and of those that ComfyUI never patches, are passed over. Raises
        InputError for a weight that the model hasn't got, and for what ComfyUI leaves out though its shape fits; after
        any error the model wears no patches, or, where there is no memory for the weights without, some, under a
        name that no job asks for.
        """
        if message.patches and not message.patches_id:
            raise InputError("patches need a patches_id; the empty one stands for none")
        if message.patches_id == self.id:
            return 0
        before = set(self._worn)
        self.id = UNSETTLED
        try:
            wanted = self._wanted(message.patches)
            self._restore()
            self._put(wanted)
        except BaseException:
            self.misfits = []
            self._restore()
            self.id = ""
            raise
        self.id = message.patches_id
        return len(before | set(wanted))

    def _wanted(self, patches: list[Patch]) -> dict[str, list[Patch]]:
        """What concerns the weights here, by weight."""
        wanted: dict[str, list[Patch]] = {}
        for patch in patches:
            # Also of weights that other ranks hold: a fault must be every rank's fault.
            _check(patch)
            if patch.key not in self._loaded.shapes:
                raise InputError(f"there is a patch for {patch.key}, a weight that this model hasn't got")
            wanted.setdefault(patch.key, []).append(patch)
        self.misfits = []
        for key, of_key in wanted.items():
            shape = self._loaded.shapes[key]
            if shape is not None:
                wanted[key], misfits = fitting(shape, of_key)
                self.misfits += misfits
        if self.misfits:
            key, why = self.misfits[0]
            log.warning("%d patches don't fit and are left out (first: %s: %s)", len(self.misfits), key, why)
        # Also where no patch is left: ComfyUI rounds a quantised weight anew for a patch that does nothing, too.
        return {key: of_key for key, of_key in wanted.items() if self._is_patched_here(key)}

    def _is_patched_here(self, key: str) -> bool:
        return self._loaded.shapes[key] is not None and key not in self._loaded.elsewhere

    def _put(self, wanted: dict[str, list[Patch]]) -> None:
        import comfy.model_patcher
        import comfy.utils

        model = self._loaded.model
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=self._device, offload_device=self._device)
        for key, patches in wanted.items():
            name = PREFIX + key
            if self._loaded.is_packed(weight := comfy.utils.get_attr(model, name)):
                self._leave_to_layer(name, weight, patches)
                continue
            patcher.patches = {name: [_entry(patch) for patch in patches]}
            if not self._loaded.can_restore(layer_of(key)):
                self._before[key] = comfy.utils.get_attr(model, name).to("cpu")
            is_cut = key in self._loaded.cut
            if is_cut:
                # The algebra, and its rounding, is that of the whole layer.
                whole = self._loaded.whole(key)
                self._worn.add(key)
                comfy.utils.set_attr_param(model, name, whole)
            with _complaints_raised(name):
                weight = patcher.patch_weight_to_device(name, device_to=self._device, return_weight=True)
            self._worn.add(key)
            comfy.utils.set_attr_param(model, name, self._loaded.own_part(key, weight) if is_cut else weight)

    def _leave_to_layer(self, name: str, weight: Any, patches: list[Patch]) -> None:
        """Leave patches to the layer, which applies them each time when it has unpacked its weight."""
        key = name.removeprefix(PREFIX)
        self._worn.add(key)
        self._packed.add(key)
        weight.patches = [([_entry(patch) for patch in patches], name)]
        layer = self._loaded.model.diffusion_model.get_submodule(layer_of(key))
        # Once here, since then whatever is wrong with them is only logged.
        with _complaints_raised(name):
            layer.get_weight(weight, self._loaded.model.get_dtype_inference())

    def _restore(self) -> None:
        """Take all patches off."""
        import comfy.utils

        for key in self._packed:
            comfy.utils.get_attr(self._loaded.model, PREFIX + key).patches = []
        self._worn -= self._packed
        self._packed.clear()
        for key, weight in self._before.items():
            comfy.utils.set_attr_param(self._loaded.model, PREFIX + key, weight.to(self._device))
        self._loaded.restore({layer_of(key) for key in self._worn - self._before.keys()})
        self._before.clear()
        self._worn.clear()


def _check(patch: Patch) -> None:
    """Raises InputError for a patch that is unsound, or makes a weight larger: the host's model would not know."""
    check_patch(patch)
    pads = patch.kind == "diff" and len(patch.weights) > 1 and patch.weights[1]["pad_weight"]
    if pads or (patch.kind == "lora" and patch.weights[5] is not None):
        raise InputError(
            f"the pool can't apply a LoRA that enlarges {patch.key} (a Flux control LoRA); use the stock sampler for it"
        )


def _entry(patch: Patch) -> tuple[Any, ...]:
    """The patch as ComfyUI's MODEL has it."""
    import comfy.utils
    import comfy.weight_adapter as adapters

    known = {adapter.name: adapter for adapter in (*adapters.adapters, adapters.BOFTAdapter)}
    values = tuple(patch.weights)
    value = known[patch.kind](set(), values) if patch.kind in known else (patch.kind, values)
    function = getattr(comfy.utils, patch.function) if patch.function else None
    return patch.strength, value, patch.strength_model, tuple(patch.offset) if patch.offset else None, function


@contextlib.contextmanager
def _complaints_raised(name: str) -> Iterator[None]:
    """Raise what ComfyUI only logs when it leaves a patch of the weight `name` out: InputError, or MemoryError.

    By its shape the patch fits (`fitting`), so it is no matter of a LoRA for another model.
    """
    said: list[str] = []
    here = threading.get_ident()

    def note(record: logging.LogRecord) -> None:
        if record.thread == here and name in record.getMessage():
            said.append(record.getMessage())

    handler = logging.Handler(logging.WARNING)
    handler.emit = note  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
    if said and is_out_of_memory(RuntimeError(said[0])):
        raise MemoryError(said[0])
    if said:
        raise InputError(f"the workers' ComfyUI leaves out a patch (LoRA): {quoted(said[0])}; remove its node")
