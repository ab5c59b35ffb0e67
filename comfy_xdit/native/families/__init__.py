"""Families of ComfyUI's own model classes, one file each."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily

from .anima import ANIMA
from .chroma import CHROMA
from .cosmos import COSMOS
from .flux import FLUX, FLUX2
from .hunyuan import HUNYUAN, HUNYUAN15
from .krea import KREA2
from .ltx import LTXV
from .ltx2 import LTXAV
from .lumina import LUMINA
from .minimax import MINIMAX
from .pixart import PIXART
from .qwen import QWEN
from .sd3 import SD3
from .wan import VACE, WAN

ALL = (
    *(MINIMAX, LTXAV, LTXV, QWEN, LUMINA, WAN, VACE, KREA2, FLUX, FLUX2, CHROMA, HUNYUAN, HUNYUAN15, ANIMA, SD3),
    *(PIXART, COSMOS),
)

FAMILIES: dict[str, ComfyFamily] = {family.name: family for family in ALL}
"""By name."""

_BY_KIND = {kind: family for family in ALL for kind in family.kinds}


def family_of(kind: str) -> ComfyFamily | None:
    """The family of models of ComfyUI's configuration class `kind`; None where there is no plan for them."""
    return _BY_KIND.get(kind)
