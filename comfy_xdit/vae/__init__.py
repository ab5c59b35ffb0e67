"""Image VAEs: read from ComfyUI's layout, run over all ranks with distvae."""

from .layout import VAEConfig, describe
from .resident import ResidentVAE, load_vae

__all__ = ["ResidentVAE", "VAEConfig", "describe", "load_vae"]
