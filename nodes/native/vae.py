"""A VAE of ComfyUI's own class on a pool, as the stock VAE nodes call it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.utils
from comfy_xdit_nodes.load_vae import STOCK_CHANNELS, host_config
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.pool import PoolSetting
from comfy_xdit_nodes.vae_remote import TYPES, NotCarried, changed, config_of, remote_vae, require_unpatched
from comfy_xdit_nodes.whole_run import Follower
from torch import Tensor

from comfy_xdit.messages import RunVAE, VAESource
from comfy_xdit.native.vae_hash import vae_hash

if TYPE_CHECKING:
    from comfy_xdit.pool.client import Pool

log = logging.getLogger("comfy_xdit")

METHODS = frozenset(("decode", "encode", "decode_tiled", "encode_tiled", "decode_tiled_", "encode_tiled_"))
"""Of ComfyUI's VAE object, which the workers call on their own."""


def source_of(vae: Any, does: str) -> VAESource:
    """How the workers make the VAE and `does` ("decode", "encode") with it.

    Raises ValueError, naming what they can't have, for VAEs of sound and shapes, changed ones, and those that draw
    random numbers.
    """
    model = vae.first_stage_model
    kind = type(model).__name__
    require_unpatched(vae, METHODS, changed)
    if vae.latent_dim not in (2, 3) or vae.extra_1d_channel is not None or vae.output_channels < 3:
        raise ValueError(f"it is a {kind}, which is not for pictures or videos")
    if does == "decode" and getattr(model, "timestep_conditioning", False):
        raise ValueError(f"this {kind} adds noise of its own when it decodes, and the workers would draw other noise")
    for key, weight in vae.get_sd().items():
        if type(weight.data) is not Tensor or weight.dtype not in TYPES:
            raise ValueError(f"its {key} is quantised")
    if use_comfy() is None:
        raise ValueError("this ComfyUI is too old for its own classes on the workers; 0.29.0 does")
    config = getattr(model, "config", None)
    return VAESource(
        kind=kind,
        hash=vae_hash(vae),
        params=_params(vae),
        config=config if isinstance(config, dict) else None,
        attributes=_attributes(vae),
    )


class VAEOnPool:
    """In place of a VAE in a stock node: its methods are the workers', all else is its own."""

    def __init__(self, vae: Any, source: VAESource, setting: PoolSetting, *, is_full: bool = False) -> None:
        self._vae, self._source, self._setting, self._is_full = vae, source, setting, is_full

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, samples: Tensor) -> Tensor:
        return self._run("decode", samples, None)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._run("encode", pixels, None)

    def decode_tiled(self, samples: Tensor, **tiling: Any) -> Tensor:
        return self._run("decode", samples, tiling)

    def encode_tiled(self, pixels: Tensor, **tiling: Any) -> Tensor:
        return self._run("encode", pixels, tiling)

    def _run(self, does: str, samples: Tensor, tiling: dict[str, Any] | None) -> Tensor:
        message = RunVAE(
            job=uuid.uuid4().hex,
            vae=(remote := remote_vae(self._vae, self._source)).load.vae,
            does=does,
            samples=samples.cpu(),
            tiling=tiling,
            is_full=self._is_full,
            is_batch=does == "decode" or self._is_batch_of_pixels(samples),
        )
        bar: comfy.utils.ProgressBar | None = None

        def show(step: int, total: int, _: None) -> None:
            nonlocal bar
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(step, total)

        def following(pool: Pool) -> Callable[[], Any]:
            return Follower(pool, message.job, show).poll

        try:
            result = remote.call(self._setting, message, following)
        except NotCarried as reason:
            say_not_carried(does, reason)
            return _stock(self._vae, does, samples, tiling)
        if result.value is None:
            raise RuntimeError(f"the workers stopped before they had {does}d; queue the workflow again")
        self._say(does, tiling, result.report)
        return result.value.to(self._vae.output_device)

    def _is_batch_of_pixels(self, pixels: Tensor) -> bool:
        """Whether the first dim is none of time. What works on the whole batch at the end gets the whole."""
        if self._vae.format_encoded is not None:
            return False
        return self._vae.latent_dim == 2 or pixels.ndim == 5 or self._vae.not_video

    def _say(self, does: str, tiling: dict[str, Any] | None, report: dict[str, Any]) -> None:
        """The one line about a run."""
        name = f"{self._source.kind} (ComfyUI's class)"
        if report["full"]:
            log.warning("%s: no memory on the workers to %s the whole; tiles are taken, as ComfyUI does", name, does)
        if report["tiles"]:
            how = f"in {report['tiles']} tiles on {_ranks(report)}"
        elif tiling is not None or report["full"]:
            how = "by one rank, since this VAE makes its tiles itself"
        elif report["ranks"] > 1:
            how = f"as a batch on {_ranks(report)}"
        else:
            how = "by one rank, since a single one is not cut"
        log.info("%s: %sd %s", name, does, how)


def say_not_carried(does: str, reason: Exception) -> None:
    log.info("ComfyUI %ss with this VAE itself, on one device: %s", does, reason)


def _stock(vae: Any, does: str, samples: Tensor, tiling: dict[str, Any] | None) -> Tensor:
    """What the VAE itself gives."""
    if tiling is None:
        return getattr(vae, does)(samples)  # type: ignore[no-any-return]
    return getattr(vae, f"{does}_tiled")(samples, **tiling)  # type: ignore[no-any-return]


def _ranks(report: dict[str, Any]) -> str:
    return "1 rank" if report["ranks"] == 1 else f"{report['ranks']} ranks"


def _params(vae: Any) -> dict[str, Any] | None:
    """What ComfyUI's AutoencoderKL was made with, where it was not made of the weights alone (Load VAE (xDiT))."""
    try:
        config = config_of(vae)
    except ValueError:
        return None
    is_stock = config.block_out_channels == STOCK_CHANNELS and config.layers_per_block == 2
    return None if is_stock else host_config(config)


def _attributes(vae: Any) -> dict[str, int]:
    """What Load VAE (xDiT) sets on it."""
    names = ("latent_channels", "downscale_ratio", "upscale_ratio")
    return {} if _params(vae) is None else {name: getattr(vae, name) for name in names}
