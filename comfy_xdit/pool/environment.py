"""The environment that workers run in: made here alone, whoever started the pool.

A pool outlives the ComfyUI or the shell that started it, so what happened to be set there must not decide how, or
whether, the next client's pictures are computed. What users set for NCCL itself is kept: only they know their machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from pathlib import Path

ALLOCATOR = "expandable_segments:True"
"""torch's own allocator, in segments that grow. ComfyUI sets cudaMallocAsync for its own process, under which
fragments can't be counted or given back, and a receive of NCCL and a free can wait for each other."""

SET = {
    # The name of torch's variable up to 2.8, and since.
    "PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR,
    "PYTORCH_ALLOC_CONF": ALLOCATOR,
    # Queues of a device: with few, a receive that waits for its sender holds up work that does not.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}

DROPPED = {
    "CUDA_LAUNCH_BLOCKING": "each receive would be waited for on the spot",
    "NVIDIA_TF32_OVERRIDE": "other numbers",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "other numbers",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each free would wait for the device",
    "PYTORCH_HIP_ALLOC_CONF": "the allocator's other name, on ROCm",
    "TORCH_DISTRIBUTED_DEBUG": "further collectives, in which ranks may wait",
    "TORCH_NCCL_BLOCKING_WAIT": "each receive would be waited for on the spot",
    "NCCL_BLOCKING_WAIT": "torch's older name of that; no variable of NCCL's",
    "NCCL_COMM_ID": "all groups of ranks would meet at one place",
}
"""What is left out, and what it would do."""

DROPPED_PREFIXES = {
    "DIFFUSERS_": "other attention than the plan's",
    "PYTORCH_TUNABLEOP_": "other kernels than on other ranks",
}

TOLD_PREFIXES = ("NCCL_", "TORCH_NCCL_")
TOLD = (
    *SET,
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"),
)

VISIBLE = {
    "CUDA_VISIBLE_DEVICES": "/dev/nvidia[0-9]*",
    "HIP_VISIBLE_DEVICES": "/sys/class/kfd/kfd/topology/nodes/*/gpu_id",
    "ROCR_VISIBLE_DEVICES": "/sys/class/kfd/kfd/topology/nodes/*/gpu_id",
}
"""Variables that hide GPUs, and the files of which the system has one for each GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What `settle` did. replaced: values of the user's that gave way to ours."""

    replaced: dict[str, str]
    dropped: dict[str, str]

    def __str__(self) -> str:
        """One sentence; "" when there was nothing to do but to set what was not set."""
        said = [f"{name}={value} gives way to {SET[name]}" for name, value in self.replaced.items()]
        said += [f"{name}={value} is left out ({why(name)})" for name, value in self.dropped.items()]
        return f"in the workers' environment {'; '.join(said)}" if said else ""


def settle(environment: MutableMapping[str, str], *, interface: str, nccl_interface: str) -> Changes:
    """Make it a worker's, before torch is imported.

    interface: where gloo and RPC listen; nccl_interface: the same in NCCL's spelling.
    """
    replaced = {name: environment[name] for name, value in SET.items() if environment.get(name, value) != value}
    dropped = {name: environment.pop(name) for name in sorted(environment) if why(name)}
    environment.update(SET)
    # Whatever a worker and its libraries open, they open there.
    environment.update(
        GLOO_SOCKET_IFNAME=interface, TP_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=nccl_interface
    )
    return Changes(replaced=replaced, dropped=dropped)


def why(name: str) -> str:
    """Why a variable is left out; "" for one that is kept."""
    prefix = next((prefix for prefix in DROPPED_PREFIXES if name.startswith(prefix)), "")
    return DROPPED.get(name) or DROPPED_PREFIXES.get(prefix, "")


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """What of it a user may want to know: what is set here, what chooses devices, and all that is NCCL's."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name in TOLD or name.startswith(TOLD_PREFIXES)
    }


def hidden(environment: Mapping[str, str], root: Path = Path("/")) -> str:
    """A sentence about GPUs of this machine that a variable keeps from the pool; "" when there are none such."""
    for name, files in VISIBLE.items():
        if name not in environment:
            continue
        have = sum(_is_gpu(path) for path in root.glob(files.lstrip("/")))
        # The driver takes the list up to the first entry that is no device.
        listed = environment[name].split(",")
        seen = next((i for i, entry in enumerate(listed) if entry.strip() in ("", "-1")), len(listed))
        if seen < have:
            return (
                f"{name}={environment[name]!r} leaves the pool {seen} of this machine's {have} GPUs (ComfyUI's "
                "--cuda-device sets it, for example); to use all, start the pool from a shell without it: "
                "`comfy-xdit pool start`"
            )
    return ""


def _is_gpu(path: Path) -> bool:
    """Of AMD's topology nodes, those with number 0 are CPUs."""
    try:
        return path.name != "gpu_id" or path.read_text().strip() != "0"
    except OSError:
        return False
