"""Families of ComfyUI's own model classes, one file each."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily

from .qwen import QWEN
from .wan import WAN

FAMILIES: dict[str, ComfyFamily] = {family.name: family for family in (QWEN, WAN)}
"""By name."""

_BY_KIND = {kind: family for family in FAMILIES.values() for kind in family.kinds}


def family_of(kind: str) -> ComfyFamily | None:
    """The family of models of ComfyUI's configuration class `kind`; None where there is no plan for them."""
    return _BY_KIND.get(kind)
