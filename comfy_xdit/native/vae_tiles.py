"""ComfyUI's own loop over tiles, its tiles dealt out to the ranks: the same tiles, blended by it in the same order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comfy_xdit.errors import InputError

META = torch.device("meta")

MAX_DIMS = 8

Loop = Callable[[Any], Tensor]
"""A method of ComfyUI's VAE that goes through tiles, given the VAE object; it calls the VAE's model once for each."""


class Stopped(Exception):
    """The ranks agreed to stop."""


class StandIn:
    """In place of a VAE's model in ComfyUI's loop: `answer` gives what the model would make of a tile.

    fails_first: the first call is of the whole, and finds no memory: then the loop takes the tiles that ComfyUI takes.
    """

    def __init__(self, answer: Callable[[Tensor], Tensor], *, fails_first: bool) -> None:
        self._answer = answer
        self._is_to_fail = fails_first

    def decode(self, tile: Tensor) -> Tensor:
        if self._is_to_fail:
            import comfy.model_management

            self._is_to_fail = False
            raise comfy.model_management.OOM_EXCEPTION("the whole does not fit")
        return self._answer(tile)

    encode = decode


class Dealer:
    """The tiles of one job, dealt out by turns.

    model: what gives the tile in question, of the VAE's own model. group: all ranks; None when alone. stop: whether
    this rank was told to stop. done(number, total): called on every rank when so many tiles are done.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        group: dist.ProcessGroup | None,
        *,
        stop: Callable[[], bool],
        done: Callable[[int, int], None],
    ) -> None:
        self._model, self._group, self._stop, self._done = model, group, stop, done
        self._rank = 0 if group is None else dist.get_rank(group)
        self._num_ranks = 1 if group is None else dist.get_world_size(group)
        self._refusal: InputError | None = None

    def run(self, vae: Any, loop: Loop, *, fails_first: bool = False) -> tuple[Tensor | None, int]:
        """What `loop` gives with the VAE's own model, None but on rank 0, and the number of tiles.

        vae: the same on all ranks; all must call. Raises as `_end_round`.
        """
        total = self._count(vae, loop, fails_first)
        mine: list[Tensor] = []
        every: list[Tensor] = []
        seen = 0

        def deal(tile: Tensor) -> Tensor:
            nonlocal seen
            if seen % self._num_ranks == self._rank:
                mine.extend(self._tile(tile))
            seen += 1
            if seen % self._num_ranks == 0 or seen == total:
                self._end_round(mine, every, (seen - 1) % self._num_ranks + 1)
                self._done(seen, total)
            return _any_tile(tile)

        loop(_with(vae, deal, META, fails_first))
        if self._rank:
            return None, total
        # Its own order: each is let go of when it is blended in.
        every.reverse()
        return loop(_with(vae, lambda tile: every.pop(), vae.output_device, fails_first)), total

    def _count(self, vae: Any, loop: Loop, fails_first: bool) -> int:
        num_tiles = 0

        def count(tile: Tensor) -> Tensor:
            nonlocal num_tiles
            num_tiles += 1
            return _any_tile(tile)

        loop(_with(vae, count, META, fails_first))
        return num_tiles

    def _tile(self, tile: Tensor) -> list[Tensor]:
        try:
            return [self._model(tile).cpu()]
        except InputError as error:
            # Raised when the others know of it: they would wait.
            self._refusal = error
            return []

    def _end_round(self, mine: list[Tensor], every: list[Tensor], num_tiles: int) -> None:
        """Bring the round's tiles to rank 0, in order. Collective.

        Raises Stopped when a rank was told to stop, InputError when the model of one refused: on every rank.
        """
        found = torch.tensor([int(self._stop()), int(self._refusal is not None)])
        if self._group is not None:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        is_stopped, is_refused = found.tolist()
        if is_refused:
            raise self._refusal or InputError("the VAE of another worker refused")
        if is_stopped:
            raise Stopped
        if self._rank == 0:
            every.append(mine.pop())
            every.extend(receive(rank, self._group) for rank in range(1, num_tiles))
        elif mine:
            send(mine.pop(), 0, self._group)


def send(tensor: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    """To be received by `receive` there. `group` has all ranks, connected on the CPU whatever their devices."""
    shape = [tensor.ndim, DTYPES.index(tensor.dtype), *tensor.shape]
    header = torch.tensor(shape + [0] * (MAX_DIMS + 2 - len(shape)))
    dist.send(header, group=group, dst=rank)
    dist.send(tensor.contiguous().view(torch.uint8).flatten(), group=group, dst=rank)


def receive(rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """What `send` sent there."""
    header = torch.zeros(MAX_DIMS + 2, dtype=torch.int64)
    dist.recv(header, group=group, src=rank)
    num_dims, dtype, *shape = header.tolist()
    tensor = torch.empty(shape[:num_dims], dtype=DTYPES[dtype])
    dist.recv(tensor.view(torch.uint8).flatten(), group=group, src=rank)
    return tensor


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What a tile may be of, numbered for a message."""


def _with(vae: Any, answer: Callable[[Tensor], Tensor], output_device: torch.device, fails_first: bool) -> Any:
    """The VAE with another model, whose output is put together on `output_device`."""
    other = copy.copy(vae)
    other.first_stage_model = StandIn(answer, fails_first=fails_first)
    other.output_device = output_device
    return other


def _any_tile(tile: Tensor) -> Tensor:
    """Stands for the output of a tile where nothing is put together: of no memory, of a shape that goes anywhere."""
    return torch.empty((1,) * tile.ndim, device=META)
