"""A VAE that stays on the workers, and its decode and encode over a process group."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, is_out_of_memory
from ..messages import LoadVAE
from ..weights.mapped import MappedFile
from .layout import VAEConfig, describe, translate
from .split import forget_halos, split, whole

log = logging.getLogger("comfy_xdit")


class ResidentVAE:
    """An `AutoencoderKL` on this rank's device.

    weights: {diffusers' name: tensor}, all of one dtype, on `device`; both forms of the module use them.
    """

    def __init__(self, key: str, config: VAEConfig, weights: dict[str, Tensor], device: torch.device) -> None:
        self.key = key
        self.config = config
        self.device = device
        self.dtype = next(iter(weights.values())).dtype
        self._weights = weights
        self._whole = whole(config, weights)
        self._split: tuple[ProcessGroup, torch.nn.Module] | None = None

    def bytes_held(self) -> int:
        """Bytes of weights on this rank."""
        return sum(weight.nbytes for weight in self._weights.values())

    def touch(self) -> None:
        """Read every weight, so that no page of the file is left to be read in the first call."""
        for weight in self._weights.values():
            weight.sum()

    def decode(self, latent: Tensor, group: ProcessGroup | None = None) -> Tensor | None:
        """The image [batch, 3, height · ratio, width · ratio] in about -1..1, on the CPU; None but on rank 0.

        latent: [batch, channels, height, width], unscaled, the same on all ranks.
        Collective: every rank of `group` (None: all ranks) must call.
        Raises InputError for a latent of another VAE, MemoryError when memory is full.
        """
        self.check_latent(latent)

        def run(vae: Any, x: Tensor) -> Tensor:
            return vae.decoder(vae.post_quant_conv(x) if self.config.post_quant_conv else x)

        return self._run(run, latent, rows=latent.shape[2], group=group)

    def encode(self, image: Tensor, group: ProcessGroup | None = None) -> Tensor | None:
        """The moments [batch, 2 · channels, height, width] of the latent, on the CPU; None but on rank 0.

        image: [batch, 3, H, W] in -1..1, the same on all ranks. Means are the first half of the channels.
        Collective: every rank of `group` (None: all ranks) must call.
        Raises as `decode` does, and InputError for an image smaller than one latent pixel.
        """
        self.check_image(image)
        # Rows that make no whole latent row would put the ranks' bands off the grid of the strides.
        rows = 0 if image.shape[2] % self.config.ratio else image.shape[2] // self.config.ratio

        def run(vae: Any, x: Tensor) -> Tensor:
            moments = vae.encoder(x)
            return vae.quant_conv(moments) if self.config.quant_conv else moments

        return self._run(run, image, rows=rows, group=group)

    def check_latent(self, latent: Tensor) -> None:
        """Raises InputError for what `decode` doesn't take."""
        self._check(latent, self.config.latent_channels, "latent", least=1)

    def check_image(self, image: Tensor) -> None:
        """Raises InputError for what `encode` doesn't take."""
        self._check(image, 3, "image", least=self.config.ratio)

    def _check(self, x: Tensor, channels: int, what: str, *, least: int) -> None:
        if x.ndim != 4 or x.shape[0] < 1 or x.shape[1] != channels or min(x.shape[2:]) < least:
            raise InputError(
                f"a {what} of shape {list(x.shape)} does not fit this VAE; "
                f"it takes [batch, {channels}, height, width] with at least {least} rows and columns"
            )
        if not x.is_floating_point():
            raise InputError(f"a {what} of {str(x.dtype).removeprefix('torch.')} is no {what}; give float numbers")

    def _run(
        self,
        run: Callable[[Any, Tensor], Tensor],
        batch: Tensor,
        *,
        rows: int,
        group: ProcessGroup | None,
    ) -> Tensor | None:
        alone = not dist.is_initialized()
        rank, num_ranks = (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
        cut = 1 < num_ranks <= rows
        if not cut and rank != 0:
            return None
        if not cut and num_ranks > 1:
            log.info(
                "VAE: %s rows of %s are too few or too uneven to cut for %d ranks; one rank does it",
                rows or "the",
                list(batch.shape),
                num_ranks,
            )
        vae = self._cut_for(group) if cut else self._whole
        done = []
        with torch.no_grad(), memory_errors(f"VAE of {list(batch.shape)} on {num_ranks} ranks"):
            # One image at a time: norms know no batch, and the peak is that of one image.
            for one in batch.split(1):
                out = run(vae, one.to(self.device, self.dtype))
                if rank == 0:
                    done.append(out.cpu())
                del out
                forget_halos(vae)
        return torch.cat(done) if rank == 0 else None

    def _cut_for(self, group: ProcessGroup | None) -> torch.nn.Module:
        # By identity of the group: after workers rebuilt theirs, a module cut for the old one is useless.
        own = dist.group.WORLD if group is None else group
        assert own is not None
        if self._split is None or self._split[0] is not own:
            self._split = (own, split(self.config, self._weights, own))
        return self._split[1]


def load_vae(message: LoadVAE, device: torch.device | str) -> ResidentVAE:
    """The VAE of `message.path`, cast to `message.dtype`, on `device`.

    Raises InputError when the file is unsound or no image VAE in ComfyUI's layout, or lacks weights;
    MemoryError when memory is full.
    """
    dtype = getattr(torch, message.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype={message.dtype!r} is no float type; use float32, bfloat16 or float16")
    file = MappedFile(message.path)
    try:
        config = describe({key: info.shape for key, info in file.infos.items()})
    except InputError as error:
        raise InputError(f"{os.path.basename(message.path)} cannot be split over ranks: {error}") from None
    shapes = {name: parameter.shape for name, parameter in config.build().named_parameters()}
    weights: dict[str, Tensor] = {}
    with memory_errors("weights of a VAE"):
        for key in file.infos:
            name = translate(key.removeprefix(config.prefix), len(config.block_out_channels))
            if not key.startswith(config.prefix) or name is None or name not in shapes:
                continue
            weights[name] = _fit(key, file.tensor(key), shapes[name]).to(torch.device(device), dtype)
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        name = os.path.basename(message.path)
        raise InputError(f"{name} lacks {len(missing)} weights of its VAE, such as {missing[0]}")
    return ResidentVAE(message.vae, config, weights, torch.device(device))


def _fit(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in diffusers' shape: attention weights are 1 x 1 convolutions in LDM, matrices there."""
    if tensor.ndim == 4 and len(shape) == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.shape != shape:
        raise InputError(f"{key} is {list(tensor.shape)}; this VAE would need {list(shape)}")
    return tensor


@contextlib.contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn the allocators' errors into MemoryError, which says what there was no memory for, and a way out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{what}; VAE nodes with tiles need less") from error
