"""What a file itself says about the formats of its quantised layers.

ComfyUI's files say it in a small tensor `comfy_quant` beside each layer's weight, or in one entry of the header's
metadata, both as JSON with a "format".
"""

from __future__ import annotations

import json
from typing import Any

from comfy_xdit.weights.header import TensorInfo, read_metadata

ENDING, ENTRY = ".comfy_quant", "_quantization_metadata"

LIMIT_BYTES = 4096
"""The longest description of a layer that is read; real ones have a tenth of it."""


def layer_formats(path: str, infos: dict[str, TensorInfo]) -> dict[str, str]:
    """Layer → its format; of a file that says nothing of it, no layer.

    infos: the file's header. A description that can't be read counts as "an unknown format".
    """
    described: dict[str, Any] = {}
    layers = _parsed(read_metadata(path).get(ENTRY, "{}")).get("layers")
    if isinstance(layers, dict):
        described |= layers
    with open(path, "rb") as file:
        for key, info in infos.items():
            if key.endswith(ENDING):
                file.seek(info.begin)
                described[key.removesuffix(ENDING)] = _parsed(file.read(min(info.end - info.begin, LIMIT_BYTES)))
    return {layer: _named(description) for layer, description in described.items()}


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(description: Any) -> str:
    """What its makers call it, with the rotation that may be added to a format."""
    described = description if isinstance(description, dict) else {}
    name, more = described.get("format"), described.get("params")
    if not isinstance(name, str):
        return "an unknown format"
    rotated = described.get("convrot") or (isinstance(more, dict) and more.get("convrot"))
    return f"{name[:40]} with convrot" if rotated and "convrot" not in name else name[:40]
