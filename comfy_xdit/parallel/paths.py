"""Modules by their paths."""

from __future__ import annotations

from torch import nn


def find(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """Submodules whose path fits `pattern`, in order; a `*` is any one child, a missing name fits nothing."""
    found = [("", module)]
    for part in pattern.split("."):
        found = [
            (f"{path}.{name}" if path else name, child)
            for path, parent in found
            for name, child in parent.named_children()
            if part in ("*", name)
        ]
    return found
