"""Networks for the cost model's tests, by their shapes alone, and files that hold nothing but a header."""

import functools
import json
import math
import struct
from types import SimpleNamespace

from comfy_xdit_bench.checkpoint import FluxSize

from comfy_xdit.cost.arithmetic import ANATOMIES, network
from comfy_xdit.cost.links import Device
from comfy_xdit.models import FAMILIES

FLUX_DEV = FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context_dim=4096, pooled_dim=768)
GPU = Device(name="gpu", flops_per_s=200e12, memory_bytes=80e9)


def network_of(family, shapes):
    """The network with weights of these shapes, in bf16."""
    infos = {key: SimpleNamespace(shape=shape) for key, shape in shapes.items()}
    config = FAMILIES[family].config(infos)
    num_bytes = 2 * sum(math.prod(shape) for shape in shapes.values())
    return network(ANATOMIES[family], infos, config, FAMILIES[family].shape(config), num_bytes)


@functools.cache
def flux_dev():
    return network_of("flux", FLUX_DEV.shapes())


def header_only(path, shapes):
    """A file with a true header, and a hole where the weights would be."""
    entries, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return str(path)
