"""Which workers a workflow runs on, and how it is spread over them."""

from __future__ import annotations

import dataclasses
import functools
import platform
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from comfy_xdit.parallel.spec import BALANCES

if TYPE_CHECKING:
    from comfy_xdit.pool.client import Pool

CATEGORY = "xDiT"

POOL_INPUT = (
    "XDIT_POOL",
    {
        "tooltip": "Which workers to use, from Worker Pool (xDiT). "
        "Without it: the pool 'default' on all GPUs, its degrees chosen for the model."
    },
)

METHODS = {
    "dp": "Splits the batch: each group of ranks takes some of its images.",
    "cfg": "Runs the positive and the negative prompt side by side, when the sampler's cfg is above 1.",
    "pipe": "Gives each rank some of the model's blocks (PipeFusion).",
    "ring": "Splits the image's tokens; keys and values go round while ranks compute. For few ranks or fast links.",
    "ulysses": "Splits the image's tokens, then the attention heads. Each rank sends less the more there are.",
    "tensor": "Splits every weight matrix, so that each rank holds a part of the model.",
    "distri": "Splits the image's tokens; each rank uses the others' keys and values of the step before, "
    "so that none waits for another (DistriFusion). Near to exact, nearer with more steps.",
}
"""What each degree does, in the words of a tooltip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSetting:
    """The value of an XDIT_POOL link: a pool's name, its devices, and degrees (0 = chosen for the model).

    distri: approximate, so never chosen: 1 = off. num_patches: of PipeFusion, 0 = chosen; warmup_steps:
    evaluations before activations are used again. balance: what the stages of pipe have alike, one of `BALANCES`.
    sampling: "auto" runs the whole sampling loop on the workers where it can, "step" never does.
    trace: what each rank did when in a sampling run is written to ComfyUI's output folder.
    """

    name: str = "default"
    devices: str = "auto"
    dp: int = 0
    cfg: int = 0
    pipe: int = 0
    ring: int = 0
    ulysses: int = 0
    tensor: int = 0
    distri: int = 1
    num_patches: int = 0
    warmup_steps: int = 1
    balance: str = BALANCES[0]
    sampling: str = "auto"
    trace: bool = False

    @property
    def requested(self) -> dict[str, int]:
        """Axis → degree, 0 where it is to be chosen."""
        return {axis: getattr(self, axis) for axis in METHODS}

    @property
    def reuse(self) -> dict[str, int]:
        """What a `Sample` message says on methods that use activations again."""
        return {"num_patches": self.num_patches, "warmup_steps": self.warmup_steps}


def connect(setting: PoolSetting) -> Pool:
    """The pool of `setting`, started when none of its name runs. Raises PoolError with a sentence."""
    return _connect(setting.name, setting.devices)


@functools.cache
def _connect(name: str, devices: str) -> Pool:
    """One client per pool: models that it loaded and values that it held are known to it alone."""
    if platform.system() != "Linux" or not torch.distributed.is_available():
        raise ValueError(
            f"a worker pool needs Linux and torch.distributed, which torch {torch.__version__} on {platform.system()} "
            "does not have; run ComfyUI on Linux, or in WSL2 on Windows"
        )
    # Here, not at import: it takes modules that only Linux has, and the nodes must be listed everywhere.
    from comfy_xdit.pool.client import Pool

    return Pool.connect(name, devices)


class XDiTWorkerPool:
    """Names a pool and the degrees to run with; starts nothing."""

    DESCRIPTION = (
        "Chooses the workers that run a diffusion transformer, and how it is spread over them. "
        "The product of the degrees is the number of workers; 0 leaves a degree to the model's needs."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("XDIT_POOL",)
    RETURN_NAMES = ("pool",)
    OUTPUT_TOOLTIPS = ("Connect it to the `pool` input of any xDiT node.",)
    FUNCTION = "make"
    SEARCH_ALIASES = ("xdit", "multi gpu", "parallel", "taco")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        devices = {
            "default": "auto",
            "tooltip": "'auto' takes every GPU, and without a GPU one process per core, at most 4. "
            "Or name them: 'cuda:0,1' or 'cpu:2'. Used when the pool starts; a running pool keeps its own.",
        }
        name = {
            "default": "default",
            "tooltip": "The pool's name. A pool outlives ComfyUI: its models stay loaded. "
            "Workflows that name the same pool share it, and queue.",
        }
        degrees = {
            axis: ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": f"{METHODS[axis]} 0 = automatic."})
            for axis in ("dp", "cfg", "pipe", "ring", "ulysses", "tensor")
        }
        sampling = {
            "default": "auto",
            "tooltip": "'auto': the whole sampling loop runs on the workers, where no other node needs to act between "
            "its steps; the log says why not. 'step': always ComfyUI's own loop, each step sent by itself.",
        }
        trace = {
            "default": False,
            "tooltip": "Writes, for every sampling run, what each rank did when (computing, communicating, waiting; "
            "bytes, peak memory): a picture, and a JSON file for chrome://tracing, in output/comfy-xdit. "
            "The log names them.",
        }
        return {
            "required": {"devices": ("STRING", devices), **degrees, "name": ("STRING", name)},
            "optional": {
                "sampling": (["auto", "step"], sampling),
                **cls._reuse(),
                "trace": ("BOOLEAN", trace),
            },
        }

    @staticmethod
    def _reuse() -> dict[str, Any]:
        """Inputs of the methods that use activations again, which no default turns on."""
        patches = (
            "Of pipe: into how many patches the image's tokens are cut, which follow each other through the stages."
        )
        warmup = (
            "Of pipe and distri: so many evaluations of the model are exact, before activations are used again. "
            "More come nearer to one GPU's image, and take longer; 10000, or as many as the sampler makes, are exact."
        )
        balance = (
            "Of pipe: what the ranks have alike. 'time': all take as long, which is fastest. 'memory': all hold as "
            "many weights, for when they would not fit: of Flux.1 half on each of two ranks, instead of 65 and 35 %."
        )
        return {
            "distri": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": f"{METHODS['distri']} 1 = off."}),
            "num_patches": ("INT", {"default": 0, "min": 0, "max": 1024, "tooltip": f"{patches} 0 = automatic."}),
            "warmup_steps": ("INT", {"default": 1, "min": 1, "max": 10000, "tooltip": warmup}),
            "balance": (list(BALANCES), {"default": BALANCES[0], "tooltip": balance}),
        }

    def make(self, devices: str, name: str, **choices: Any) -> tuple[PoolSetting]:
        return (PoolSetting(name=name.strip() or "default", devices=devices.strip() or "auto", **choices),)
