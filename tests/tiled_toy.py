"""A VAE as small as one can be whose own loop goes through tiles, and a deal of them, for ranks of tests."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.native.vae_tiles import Dealer, Stopped


class Model:
    def decode(self, tile: Tensor) -> Tensor:
        # What it gives depends on all of the tile, so that no other tile would do.
        return (tile.repeat_interleave(2, -1) + tile.mean()).to(torch.float16)


class ToyVAE:
    """Decodes [1, 1, width] to [1, 1, 2 · width], tile by tile; neighbours overlap, and sums depend on the order."""

    def __init__(self) -> None:
        self.first_stage_model = Model()
        self.output_device = torch.device("cpu")

    def decode_tiled(self, samples: Tensor, size: int) -> Tensor:
        width = samples.shape[-1]
        out = torch.zeros(1, 1, 2 * width, device=self.output_device)
        for begin in range(0, width - 1, size - 1):
            tile = self.first_stage_model.decode(samples[..., begin : begin + size])
            place = out.narrow(-1, 2 * begin, 2 * min(size, width - begin))
            place.mul_(0.5).add_(tile.to(self.output_device))
        return out


def deal(samples: Tensor, size: int, stops_at: int | None = None, refuses: float | None = None) -> dict:
    """What this rank has of a deal. stops_at: rank 1 wishes to stop after so many tiles; refuses: a tile with it."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    rank = 0 if group is None else dist.get_rank(group)
    vae, seen, steps = ToyVAE(), [], []

    def model(tile: Tensor) -> Tensor:
        if refuses is not None and (tile == refuses).any():
            raise InputError("this tile is refused")
        seen.append(tile[0, 0, 0].item())
        return vae.first_stage_model.decode(tile)

    def stop() -> bool:
        return stops_at is not None and rank == 1 and len(seen) >= stops_at

    dealer = Dealer(model, group, stop=stop, done=lambda step, total: steps.append((step, total)))
    try:
        result, num_tiles = dealer.run(vae, lambda one: one.decode_tiled(samples, size))
    except (Stopped, InputError) as error:
        return {"error": f"{type(error).__name__}: {error}", "seen": seen}
    return {"result": result, "tiles": num_tiles, "seen": seen, "steps": steps}
