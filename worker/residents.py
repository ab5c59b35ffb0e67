"""The models and VAEs that one rank holds: loaded, found again, and freed, the least recently used first."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from comfy_xdit import messages as m
from comfy_xdit.errors import InputError, is_out_of_memory
from comfy_xdit.native.resident import ComfyModel
from comfy_xdit.native.vae import ComfyVAE
from comfy_xdit.weights.stamp import stamp

from .lent import Lent, lent

if TYPE_CHECKING:
    from comfy_xdit.models.resident import ResidentModel
    from comfy_xdit.parallel.spec import ParallelSpec, WeightShare
    from comfy_xdit.vae import ResidentVAE

    Loaded = ResidentModel | ComfyModel | ResidentVAE | ComfyVAE

log = logging.getLogger("comfy_xdit")

AGAIN = "queue the workflow again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Resident:
    """One of them: `what` the message asked for.

    stamp: of its file, as this machine saw it at the load; layout: each rank's part of a model; lent: its file, if a
    process lends it for as long as it lives.
    """

    load: m.LoadModel | m.LoadVAE
    stamp: m.FileStamp
    what: Any
    layout: list[WeightShare] | None = None
    lent: Lent | None = None


class Residents:
    """What is resident, by key.

    Where memory ends in a load, others make room, and not alike on every rank: a load that finds its model here does
    nothing, so the client repeats it before each job, and each rank's answer says which patches its model wears.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self._rank, self._world_size, self._device = rank, world_size, device
        # In the order of their last use.
        self._held: dict[str, _Resident] = {}

    @property
    def loads(self) -> list[m.Message]:
        """The messages that made them resident, the last used last."""
        return [held.load for held in self._held.values()]

    @property
    def models(self) -> dict[str, ResidentModel | ComfyModel]:
        return {key: held.what for key, held in self._held.items() if isinstance(held.load, m.LoadModel)}

    @property
    def vaes(self) -> list[str]:
        return [key for key, held in self._held.items() if isinstance(held.load, m.LoadVAE)]

    def load_model(self, message: m.LoadModel) -> ResidentModel | ComfyModel:
        """The model of `message`, loaded unless it is here already. Raises InputError for files that don't do."""
        # All ranks' parts are compared: were only some ranks to load, only some would lose their patches.
        layout = self._layout(message.spec, message.balance)
        now = self._stamp(message)
        held = self._held.get(message.model)
        is_other = held is not None and (held.layout != layout or _is_other(held, message, now))
        if held is None or is_other or held.load.source != message.source:
            self._check_fingerprint(message)
            self._make(message.model, message, now, lambda: self._load(message), layout)
        else:
            self._use(message.model, message)
        return self.models[message.model]

    def _load(self, message: m.LoadModel) -> ResidentModel | ComfyModel:
        if message.source is not None:
            return ComfyModel(message, self._device, message.spec.weights_of(self._rank, message.balance))
        from comfy_xdit.models.resident import load

        return load(message, self._device, rank=self._rank)

    def load_vae(self, message: m.LoadVAE) -> None:
        """As `load_model`."""
        now = self._stamp(message)
        held = self._held.get(message.vae)
        if held is None or _is_other(held, message, now) or held.load.source != message.source:
            self._make(message.vae, message, now, lambda: self._load_vae(message))
        else:
            self._use(message.vae, message)

    def _load_vae(self, message: m.LoadVAE) -> ResidentVAE | ComfyVAE:
        if message.source is not None:
            return ComfyVAE(message, self._device)
        from comfy_xdit.vae import load_vae

        return load_vae(message, self._device)

    def model(self, key: str) -> ResidentModel | ComfyModel:
        """Raises InputError when it is not here, or its file is not what it was."""
        return self._ready(key, m.LoadModel)

    def model_for(self, key: str, spec: ParallelSpec) -> ResidentModel | ComfyModel:
        """As `model`, and InputError when its weights are not spread as `spec` needs them: alike on every rank."""
        model, held = self.model(key), self._held[key]
        assert isinstance(held.load, m.LoadModel)
        if held.layout != self._layout(spec, held.load.balance):
            raise InputError(
                f"the model is loaded for {held.load.spec}, which spreads its weights otherwise than {spec}; {AGAIN}"
            )
        if isinstance(model, ComfyModel):
            model.require_whole_inputs(spec)
        return model

    def vae(self, key: str) -> ResidentVAE | ComfyVAE:
        """As `model`."""
        return self._ready(key, m.LoadVAE)

    def require_unchanged(self, key: str) -> None:
        """Raises InputError when the file was written to, or another put in its place, since it was loaded.

        Weights may be views of the file: half a new one's would go with half an old one's. Before a job, and after it.
        A file that is gone is still mapped, and nobody can write to it.
        """
        held = self._held[key]
        try:
            now = stamp(held.load.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"can't look at {os.path.basename(held.load.path)} ({error.strerror}); {AGAIN}") from None
        if now != held.stamp:
            raise _changed(held.load.path)

    def forget(self, keys: list[str]) -> None:
        """Free these; unknown keys are ignored."""
        if self._held.keys() & set(keys):
            for key in keys:
                self._held.pop(key, None)
            # Some hold themselves: a VAE object of ComfyUI's has functions that know it.
            gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def free_others(self) -> None:
        """Free all but the one used last."""
        self.forget(list(self._held)[:-1])

    def forget_abandoned(self) -> None:
        """Free those whose file was lent by a process that is gone: nobody can ask for them again."""
        gone = [key for key, held in self._held.items() if held.lent is not None and held.lent.is_abandoned]
        if gone:
            log.info("rank %d: who lent the files of %s is gone; they are unloaded", self._rank, ", ".join(gone))
            self.forget(gone)

    def forget_all(self) -> None:
        self.forget(list(self._held))

    def _ready(self, key: str, kind: type) -> Any:
        held = self._held.get(key)
        if held is None or not isinstance(held.load, kind):
            raise InputError(f"this {'VAE' if kind is m.LoadVAE else 'model'} is not loaded on the workers; {AGAIN}")
        self.require_unchanged(key)
        self._use(key)
        return held.what

    def _use(self, key: str, load: m.LoadModel | m.LoadVAE | None = None) -> None:
        held = self._held.pop(key)
        self._held[key] = held if load is None else dataclasses.replace(held, load=load)

    def _make(
        self,
        key: str,
        message: m.LoadModel | m.LoadVAE,
        before: m.FileStamp,
        make: Callable[[], Loaded],
        layout: list[WeightShare] | None = None,
    ) -> None:
        self.forget([key])  # first, so that there are never two in memory
        what = self._with_room(key, make)
        if self._stamp(message) != before:
            raise _changed(message.path)
        self._held[key] = _Resident(load=message, stamp=before, what=what, layout=layout, lent=lent(message.path))

    def _with_room(self, key: str, make: Callable[[], Loaded]) -> Loaded:
        """What `make` gives; others go, one after the other, as long as there is no memory for it."""
        while True:
            try:
                return make()
            except Exception as error:
                if not is_out_of_memory(error) or not self._held:
                    raise
                # Its frames hold the part that was loaded.
                traceback.clear_frames(error.__traceback__)
            oldest = next(iter(self._held))
            log.info("rank %d: no room for %s beside %s, which is unloaded", self._rank, key, oldest)
            gc.collect()
            self.forget([oldest])

    def _layout(self, spec: ParallelSpec, balance: str) -> list[WeightShare]:
        """Which part of a model each rank holds."""
        return [spec.weights_of(rank, balance) for rank in range(self._world_size)]

    def _stamp(self, message: m.LoadModel | m.LoadVAE) -> m.FileStamp:
        """The file's stamp now. Raises InputError when this machine has no such file, or not the one that was meant."""
        path = message.path
        try:
            now = stamp(path)
            # Without waiting for a writer: it may be anything by now.
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            raise InputError(
                f"{self._here} can't open {os.path.basename(path)} ({error.strerror}); every machine of a pool reads a "
                "model from the same path as ComfyUI's, so put the file there"
            ) from None
        # Only the kernel that made it can compare a stamp.
        is_ours = not (isinstance(message, m.LoadModel) and message.fingerprint)
        if is_ours and message.stamp not in (None, now):
            raise _changed(path)
        return now

    def _check_fingerprint(self, message: m.LoadModel) -> None:
        from comfy_xdit.weights.fingerprint import fingerprint

        if message.fingerprint and fingerprint(message.path) != message.fingerprint:
            raise InputError(
                f"{self._here} has another file as {os.path.basename(message.path)} than ComfyUI's machine; copy that "
                "one there"
            )

    @property
    def _here(self) -> str:
        return f"rank {self._rank}, on {socket.gethostname()},"


def _is_other(held: _Resident, message: m.LoadModel | m.LoadVAE, now: m.FileStamp) -> bool:
    """Whether the file is another than the one that was loaded, as this machine or the client sees it."""
    told = (held.load.stamp, message.stamp)
    return held.stamp != now or (None not in told and told[0] != told[1])


def _changed(path: str) -> InputError:
    return InputError(
        f"the file {os.path.basename(path)} was changed after it was loaded; choose it in its loader again, so that "
        "ComfyUI reads it anew"
    )
