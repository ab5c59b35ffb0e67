"""One VAE in two forms that share their weights: whole, and cut into bands of rows over a process group."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .bands import BandConv, BandNorm
from .layout import VAEConfig


def whole(config: VAEConfig, weights: dict[str, Tensor]) -> nn.Module:
    """The VAE as diffusers has it, on one rank."""
    vae = config.build()
    _assign(vae, _names(vae), weights)
    return vae


def split(config: VAEConfig, weights: dict[str, Tensor], group: ProcessGroup) -> nn.Module:
    """The VAE whose stages each hold a band of the rows, one band for each rank of `group`.

    The attention in the middle sees all rows on every rank; it runs at the latent's size.
    Collective when called: every rank of `group` must call the encoder or decoder with the same input.
    Source: DistVAE, https://github.com/xdit-project/DistVAE.
    """
    from distvae.models.layers.conv2d import PatchConv2d
    from distvae.models.layers.normalization import PatchGroupNorm
    from distvae.vae import parallelize_decoder, parallelize_encoder

    vae = config.build()
    # distvae renames modules but keeps their parameters: identity still tells which is which. Cut while
    # on meta, or each convolution is drawn at random first, at full size.
    names = _names(vae)
    parallelize_decoder(vae, group)
    parallelize_encoder(vae, group)
    for parent in list(vae.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PatchGroupNorm):
                setattr(parent, name, BandNorm(layer, group))
            elif isinstance(layer, PatchConv2d) and BandConv.fits(layer):
                setattr(parent, name, BandConv(layer, group))
    _assign(vae, names, weights)
    return vae.eval()


def forget_halos(vae: nn.Module) -> None:
    """Free the rows that distvae keeps for the next call: one set for every size ever seen."""
    for module in vae.modules():
        buffers = getattr(module, "halo_buffer", None)
        if isinstance(buffers, dict):
            buffers.clear()


def _names(vae: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in vae.named_parameters()}


def _assign(vae: nn.Module, names: dict[int, str], weights: dict[str, Tensor]) -> None:
    for module in vae.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = weights[names[id(parameter)]]
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
