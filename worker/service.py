"""What a rank does for each message: the resident models and VAEs, and the work on them.

One `Service` lives in each worker, and only its main thread calls it, message after message in the
same order on every rank: so collectives line up without a lock.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from comfy_xdit import messages as m
from comfy_xdit.errors import InputError
from comfy_xdit.mailbox import Mailbox
from comfy_xdit.native.resident import ComfyModel
from comfy_xdit.native.vae import ComfyVAE
from comfy_xdit.parallel import kernels
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.denoise import denoise
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.model import loop_dtype
from comfy_xdit.parallel.sample import sample
from comfy_xdit.vae import ResidentVAE

from .residents import AGAIN, Residents

if TYPE_CHECKING:
    from comfy_xdit.models.resident import ResidentModel

Kind = TypeVar("Kind")

MAX_UNREAD = 16
"""Previews that may wait for the client, which asks ten times a second, before new memory is pinned for one."""


class Service:
    """Handles every message of a client on one rank.

    `handle` raises InputError for the user's mistakes and lets other errors through: the loop that
    calls it turns them into a `Failure`.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        kernels.prepare(device)
        # As torchrun and the pool's own agent tell every worker.
        self._groups = GroupCache(world_size, num_local=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        self._residents = Residents(rank=rank, world_size=world_size, device=device)
        self._held: dict[str, Any] = {}
        self._comfy: m.UseComfy | None = None
        self._mailbox = Mailbox()
        self._handlers: dict[type, Callable[[Any], m.Result]] = {
            m.UseComfy: self._use_comfy,
            m.LoadModel: self._load_model,
            m.SetPatches: self._set_patches,
            m.Hold: self._hold,
            m.Drop: self._drop,
            m.Preprocess: self._preprocess,
            m.Denoise: self._denoise,
            m.Sample: self._sample,
            m.LoadVAE: self._load_vae,
            m.VAEDecode: self._vae_decode,
            m.VAEEncode: self._vae_encode,
            m.RunVAE: self._run_vae,
            m.Unload: self._unload,
            m.Probe: self._probe,
            m.Status: lambda message: m.Result(value=self.status()),
        }

    def handle(self, message: m.Message) -> m.Result:
        self._groups.begin_job()
        handler = self._handlers.get(type(message))
        if handler is None:
            raise InputError(f"a worker does not take {type(message).__name__}; send a request, not an answer")
        try:
            with torch.inference_mode():
                return handler(message)
        except BaseException:
            self._groups.fail()
            raise

    @property
    def has_communicated(self) -> bool:
        """Whether this rank took part in a message of the last job, so that after an error only a restart helps.

        See `GroupCache`.
        """
        return self._groups.has_communicated

    def aside(self, message: m.Message) -> m.Result:
        """Answers `Peek` and `Cancel` while another message runs; any thread may call."""
        if isinstance(message, m.Peek):
            return m.Result(value=self._mailbox.take(message.job))
        if isinstance(message, m.Cancel):
            self._mailbox.cancel(message.job)
            return m.Result()
        raise InputError(f"{type(message).__name__} is not answered beside a job; send it as a job")

    def abandon(self) -> None:
        """The client is gone: end its job after the current step. Any thread may call."""
        self._mailbox.abandon()

    def setup(self) -> list[m.Message]:
        """What a worker that replaces this one is to be told before any load."""
        return [self._comfy] if self._comfy else []

    def residents(self) -> list[m.Message]:
        """The loads to repeat in it."""
        return self._residents.loads

    def free_others(self) -> None:
        """Memory is full: keep only the model or VAE that was used last."""
        self._residents.free_others()

    def forget_abandoned(self) -> None:
        """Free what only a process that is gone could use."""
        self._residents.forget_abandoned()

    def forget_client(self) -> None:
        """Drop what a client left when its lease ended; models stay warm."""
        self._held.clear()
        self._mailbox.renew()

    def status(self) -> dict[str, Any]:
        """What is resident; the loop adds pid, device and memory."""
        return {
            "models": [_describe(key, model) for key, model in self._residents.models.items()],
            "vaes": self._residents.vaes,
        }

    def _use_comfy(self, message: m.UseComfy) -> m.Result:
        from comfy_xdit.native.boot import boot

        if self._comfy is not None and self._comfy != message:
            raise InputError(
                "the workers use the classes of another ComfyUI, or of this one with other options; restart the pool"
            )
        # Not looked at again: what is imported stays, whatever becomes of the checkout.
        if self._comfy is None:
            boot(message, self.device)
            self._comfy = message
        return m.Result(value={"version": message.version, "sources": message.sources, "kitchen": message.kitchen})

    def _load_model(self, message: m.LoadModel) -> m.Result:
        self._require_comfy(message)
        return m.Result(value=_describe(message.model, self._residents.load_model(message)))

    def _require_comfy(self, message: m.LoadModel | m.LoadVAE) -> None:
        if message.source is not None and self._comfy is None:
            raise InputError(f"the workers don't know of a ComfyUI yet; {AGAIN}")

    def _set_patches(self, message: m.SetPatches) -> m.Result:
        model = self._residents.model(message.model)
        changed = model.set_patches(message)
        return m.Result(value={"changed": changed, "misfits": model.misfits})

    def _hold(self, message: m.Hold) -> m.Result:
        self._held[message.name] = _to(message.value, self.device)
        return m.Result()

    def _drop(self, message: m.Drop) -> m.Result:
        for name in message.names:
            self._held.pop(name, None)
        return m.Result()

    def _preprocess(self, message: m.Preprocess) -> m.Result:
        model = self._residents.model(message.model)
        _require_patches(model, message.patches_id)
        if not isinstance(model, ComfyModel):
            raise InputError(f"{model.family.name} of diffusers' classes has no {message.method!r} before sampling")
        args, named = _to(message.args, self.device), _to(message.named, self.device)
        made = model.family.prepare(model, message.method, args, named)
        self._residents.require_unchanged(message.model)
        return m.Result(value=made if self.rank == 0 else None)

    def _denoise(self, message: m.Denoise) -> m.Result:
        model = self._ready_model(message)
        calls = [_to(self._recall(call), self.device) for call in message.calls]
        with ParallelContext(message.spec, self._groups, trace=message.trace) as context:
            outputs, report = denoise(model, calls, message.chunks, context)
        self._residents.require_unchanged(message.model)
        return m.Result(value=outputs if self.rank == 0 else None, report=report)

    def _sample(self, message: m.Sample) -> m.Result:
        model = self._ready_model(message)
        sent = {name: _to(getattr(message, name), self.device) for name in ("noise", "latent", "mask", "noises")}
        message = dataclasses.replace(message, **sent)
        conds = [_to(self._recall(cond), self.device) for cond in message.conds]
        self._mailbox.open(message.job)
        self._pin(message, model)
        with ParallelContext(message.spec, self._groups, trace=message.trace) as context:
            samples, report = sample(
                model,
                message,
                conds,
                context,
                post=self._post,
                wish_to_stop=lambda: self._mailbox.is_cancelled(message.job),
            )
        self._residents.require_unchanged(message.model)
        return m.Result(value=samples, report=report)

    def _pin(self, message: m.Sample, model: ResidentModel) -> None:
        """Have pinned memory for previews before the run: for new memory CUDA may wait for the whole device.

        In mid-run the device may itself wait for another rank. torch keeps what is let go of here for `_post`.
        """
        if self.device.type == "cuda" and self.rank == 0:
            num = min(MAX_UNREAD, len(message.program.previews))
            held = [torch.empty(message.noise.shape, dtype=loop_dtype(model), pin_memory=True) for _ in range(num)]
            held.clear()

    def _post(self, entry: dict[str, Any]) -> None:
        """Progress for the client. A GPU computes it some time after this: `Peek` must not wait for that."""
        denoised = entry["denoised"]
        if denoised.device.type != "cuda":
            self._mailbox.post(entry)
            return
        host = torch.empty(denoised.shape, dtype=denoised.dtype, pin_memory=True)
        host.copy_(denoised, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._mailbox.post({**entry, "denoised": host}, copied.query)

    def _load_vae(self, message: m.LoadVAE) -> m.Result:
        self._require_comfy(message)
        self._residents.load_vae(message)
        return m.Result()

    def _vae_decode(self, message: m.VAEDecode) -> m.Result:
        vae = self._vae(message.vae, ResidentVAE)
        vae.check_latent(message.latent)
        image = vae.decode(message.latent.to(self.device), self._groups.world)
        self._residents.require_unchanged(message.vae)
        return m.Result(value=image if self.rank == 0 else None)

    def _vae_encode(self, message: m.VAEEncode) -> m.Result:
        vae = self._vae(message.vae, ResidentVAE)
        vae.check_image(message.image)
        moments = vae.encode(message.image.to(self.device), self._groups.world)
        self._residents.require_unchanged(message.vae)
        return m.Result(value=moments if self.rank == 0 else None)

    def _run_vae(self, message: m.RunVAE) -> m.Result:
        if message.does not in ("decode", "encode"):
            raise InputError(f"a VAE does not {message.does!r}; it decodes and encodes")
        vae = self._vae(message.vae, ComfyVAE)
        self._mailbox.open(message.job)
        value, report = vae.run(
            message,
            self._groups.world,
            stop=lambda: self._mailbox.is_cancelled(message.job),
            done=lambda step, total: self._mailbox.post({"step": step, "total": total, "denoised": None}),
        )
        self._residents.require_unchanged(message.vae)
        return m.Result(value=value, report=report)

    def _vae(self, key: str, kind: type[Kind]) -> Kind:
        vae = self._residents.vae(key)
        if not isinstance(vae, kind):
            raise InputError(f"this VAE is on the workers as another class; {AGAIN}")
        return vae

    def _probe(self, message: m.Probe) -> m.Result:
        from comfy_xdit.cost.probe import probe

        return m.Result(value=probe(self._groups, self.device))

    def _unload(self, message: m.Unload) -> m.Result:
        if message.keys:
            self._residents.forget(message.keys)
        else:
            self._residents.forget_all()
        return m.Result()

    def _ready_model(self, message: m.Denoise | m.Sample) -> ResidentModel | ComfyModel:
        """The model that a job wants, held as it wants it: alike on every rank, or InputError on every rank."""
        model = self._residents.model_for(message.model, message.spec)
        _require_patches(model, message.patches_id)
        return model

    def _recall(self, value: Any) -> Any:
        if isinstance(value, m.Held):
            if value.name not in self._held:
                raise InputError(f"the workers hold no value {value.name!r}; {AGAIN}")
            return self._held[value.name]
        if isinstance(value, m.Tuple):
            return m.Tuple(items=self._recall(value.items))
        if isinstance(value, dict):
            return {key: self._recall(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._recall(item) for item in value]
        return value


def _require_patches(model: ResidentModel | ComfyModel, patches_id: str) -> None:
    if model.patches_id != patches_id:
        raise InputError(f"the workers hold other patches (LoRA) of this model than those of this run; {AGAIN}")


def _describe(key: str, model: ResidentModel | ComfyModel) -> dict[str, Any]:
    return {
        "model": key,
        "family": model.family.name,
        "source": "ComfyUI" if isinstance(model, ComfyModel) else "diffusers",
        "patches": model.num_patched,
        "patches_id": model.patches_id,
        "bytes": model.bytes_held(),
        "blocks": [model.stage.start, model.stage.stop],
    }


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, m.Tuple):
        return m.Tuple(items=_to(value.items, device))
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value
