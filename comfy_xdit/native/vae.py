"""A VAE of ComfyUI's own class that a rank holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comfy_xdit.errors import InputError, is_out_of_memory
from comfy_xdit.messages import LoadVAE, RunVAE, VAESource

from .vae_hash import vae_hash
from .vae_tiles import Dealer, Stopped, receive, send

WAY_OUT = "use ComfyUI's own VAE node"


class Full(Exception):
    """There was no memory for the whole; not one of torch's errors, which ComfyUI would answer alone on this rank."""


class ComfyVAE:
    """The VAE of `message`, made by ComfyUI from its file, on `device`.

    Every rank holds all of it: each decodes or encodes some of the tiles, or of the batch. Raises InputError where
    ComfyUI makes another VAE of the file than the host has; torch's error when memory is full.
    """

    def __init__(self, message: LoadVAE, device: torch.device) -> None:
        import comfy.model_management

        assert message.source is not None
        self.key = message.vae
        self.device = device
        self._vae = _made(message, message.source, device)
        # All of it, and for good: this process offloads nothing.
        self._vae.disable_offload = True
        comfy.model_management.load_models_gpu([self._vae.patcher], force_full_load=True)

    def bytes_held(self) -> int:
        """Bytes of weights on this rank."""
        return sum(weight.nbytes for weight in self._vae.first_stage_model.parameters())

    def run(
        self,
        message: RunVAE,
        group: dist.ProcessGroup | None,
        *,
        stop: Callable[[], bool],
        done: Callable[[int, int], None],
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """What ComfyUI's method gives, on the CPU, and a report; None but on rank 0, or when the job was stopped.

        Collective: every rank of `group` (None: alone) must call. stop, done: as of `Dealer`. The report has "tiles",
        "ranks" that worked, "full" where there was no memory for the whole, and "stopped".
        Raises InputError for a VAE that draws random numbers: each rank would draw others than ComfyUI.
        """
        report: dict[str, Any] = {"tiles": 0, "ranks": 1, "full": message.is_full, "stopped": False}
        num_ranks = 1 if group is None else dist.get_world_size(group)
        if message.tiling is None and not message.is_full:
            result, report["ranks"], report["full"] = self._whole(message, group)
            if not report["full"]:
                return result, report
        if self._vae.handles_tiling:
            return (self._loop(message)(self._vae) if _rank(group) == 0 else None), report
        dealer = Dealer(self._model_of(message.does), group, stop=stop, done=done)
        try:
            result, report["tiles"] = dealer.run(self._vae, self._loop(message), fails_first=message.tiling is None)
        except Stopped:
            return None, {**report, "stopped": True}
        return result, {**report, "ranks": min(num_ranks, report["tiles"])}

    def _loop(self, message: RunVAE) -> Callable[[Any], Tensor]:
        """ComfyUI's method, to be given a VAE object; without tiling it takes tiles when its model finds no memory."""
        if message.tiling is None:
            return lambda vae: getattr(vae, message.does)(message.samples)
        tiling = message.tiling
        return lambda vae: getattr(vae, f"{message.does}_tiled")(message.samples, **tiling)

    def _model_of(self, does: str) -> Callable[..., Any]:
        """The model's own method, watched: it may not draw random numbers."""
        method = getattr(self._vae.first_stage_model, does)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = _random_state(self.device)
            out = method(*args, **kwargs)
            if any(not torch.equal(one, other) for one, other in zip(before, _random_state(self.device), strict=True)):
                kind = type(self._vae.first_stage_model).__name__
                raise InputError(
                    f"this VAE ({kind}) draws random numbers as it {does}s, and the workers would draw others than "
                    f"ComfyUI; {WAY_OUT}"
                )
            return out

        return watched

    def _whole(self, message: RunVAE, group: dist.ProcessGroup | None) -> tuple[Tensor | None, int, bool]:
        """The result without tiles on rank 0, how many ranks worked, and whether any had no memory for its part.

        A batch is dealt out in parts, one after another as the ranks are; one alone is rank 0's.
        """
        rank, num_ranks = _rank(group), 1 if group is None else dist.get_world_size(group)
        parts = message.samples.tensor_split(min(num_ranks, len(message.samples))) if message.is_batch else ()
        parts = parts if len(parts) > 1 else (message.samples,)
        mine, failure = None, None
        if rank < len(parts):
            try:
                mine = getattr(self._spoken(message.does), message.does)(parts[rank]).cpu()
            except Full:
                pass
            # Not before the others know: they would wait.
            except InputError as error:
                failure = error
        is_full = _any(rank < len(parts) and mine is None and failure is None, group)
        if _any(failure is not None, group):
            raise failure or InputError(f"another rank could not {message.does} its part")
        if is_full:
            return None, len(parts), True
        if rank == 0:
            assert mine is not None
            return torch.cat([mine, *(receive(peer, group) for peer in range(1, len(parts)))]), len(parts), False
        if mine is not None:
            send(mine, 0, group)
        return None, len(parts), False

    def _spoken(self, does: str) -> Any:
        """The VAE, whose model says `Full` when its memory is."""
        other = copy.copy(self._vae)
        other.first_stage_model = _Told(self._vae.first_stage_model, does, self._model_of(does))
        return other


class _Told:
    """A model, one method of which raises Full where torch finds no memory."""

    def __init__(self, model: Any, does: str, method: Callable[..., Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            raise Full

        self._model = model
        setattr(self, does, call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _made(message: LoadVAE, source: VAESource, device: torch.device) -> Any:
    """ComfyUI's VAE of the file. Raises InputError where it is another than the host's."""
    import comfy.sd

    from .load import read

    weights, _ = read(message.path)
    vae = comfy.sd.VAE(
        sd=weights,
        device=device,
        config={"params": source.params} if source.params is not None else None,
        dtype=getattr(torch, message.dtype),
        metadata={"config": json.dumps({"vae": source.config})} if source.config is not None else None,
    )
    for name, value in source.attributes.items():
        setattr(vae, name, value)
    found = "no VAE" if vae.first_stage_model is None else type(vae.first_stage_model).__name__
    if found != source.kind:
        raise InputError(f"the workers' ComfyUI takes its weights for {found}, this one for {source.kind}")
    if vae_hash(vae) != source.hash:
        raise InputError(
            f"the workers' ComfyUI makes another {found} of its weights than this one has, which a node changed, or a "
            "loader made of more than weights"
        )
    return vae


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _any(mine: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether it is so on any rank. Collective."""
    flag = torch.tensor([int(mine)])
    if group is not None:
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag)


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """Of torch's own generators."""
    on_device = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *on_device)
