"""What a model on the pool costs ComfyUI's own process: the growth of its resident memory."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

from comfy_xdit_bench.checkpoint import FluxSize
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.patcher import from_checkpoint

FLUX_DEV = FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context_dim=4096, pooled_dim=768)


def skeleton_memory(folder: Path) -> dict[str, Any]:
    """Resident bytes before and after a MODEL is made of a file with the shapes of Flux.1-dev in bf16.

    The file is a header and a hole: making a MODEL reads nothing else.
    """
    # What the first model imports is no model: a small one pays for it before the count begins.
    kept = [_model(folder / "small.safetensors", FluxSize(hidden=256, double_blocks=1, single_blocks=1))]
    before = _resident_bytes()
    kept.append(_model(folder / "flux-dev.safetensors", FLUX_DEV))
    after = _resident_bytes()
    num_params = sum(weight.numel() for weight in kept[-1].model.diffusion_model.parameters())
    return {
        "parameters": num_params,
        "file_bytes": (folder / "flux-dev.safetensors").stat().st_size,
        "host_grew_bytes": after - before,
    }


def _model(path: Path, size: FluxSize) -> Any:
    header, end = {}, 0
    for key, shape in size.shapes().items():
        begin, end = end, end + 2 * _product(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return from_checkpoint(open_checkpoint(str(path)))


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
