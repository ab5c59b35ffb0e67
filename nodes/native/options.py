"""Which ComfyUI this is: what workers need to import the same classes and compute the same numbers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import comfy.utils
import comfyui_version
from comfy.cli_args import args

from comfy_xdit.messages import Result, UseComfy
from comfy_xdit.native.boot import kitchen_version, sources_of
from comfy_xdit.pool.errors import PoolError

NUMBERS = (
    *("force_fp32", "force_fp16", "fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet"),
    *("fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet", "fp16_vae", "fp32_vae", "bf16_vae"),
    *("fp16_intermediates", "force_channels_last", "supports_fp8_compute"),
    *("enable_triton_backend", "disable_triton_backend"),
    *("use_split_cross_attention", "use_quad_cross_attention", "use_pytorch_cross_attention"),
    *("use_sage_attention", "use_flash_attention", "use_ck_attention", "disable_xformers"),
    *("force_upcast_attention", "dont_upcast_attention", "deterministic"),
)
"""Options of the command line that change what is computed, in any version."""


ASKED = {"version": "ComfyUI's version", "sources": "the sources of ComfyUI", "kitchen": "comfy-kitchen's version"}
"""What each rank answers about the ComfyUI that it uses, and what people call it."""


def use_comfy() -> UseComfy | None:
    """The message that has workers use this ComfyUI's classes; None where it is too old for that."""
    if not hasattr(comfy.utils, "convert_old_quants"):
        return None
    folder = str(Path(comfyui_version.__file__).resolve().parent)
    return UseComfy(
        folder=folder,
        version=comfyui_version.__version__,
        sources=_sources(folder),
        kitchen=kitchen_version(),
        options=number_options(),
    )


def same_everywhere(answers: list[Result]) -> None:
    """Raises PoolError, naming it, for what two ranks use differently. answers: of all ranks to `use_comfy`."""
    first = answers[0].value
    for rank, answer in enumerate(answers):
        for name, title in ASKED.items():
            if answer.value[name] != first[name]:
                raise PoolError(
                    f"the workers differ in {title}: rank 0 has {first[name] or 'none'}, rank {rank} "
                    f"{answer.value[name] or 'none'}; give every machine of the pool the same ComfyUI and Python "
                    "packages, and restart the pool",
                    kind="input",
                )


def number_options() -> dict[str, Any]:
    """Those of `NUMBERS` that are set, and the features of --fast."""
    told = {name: value for name in NUMBERS if (value := getattr(args, name, None))}
    return {**told, "fast": sorted(feature.value for feature in args.fast)}


# Once a process: a checkout that is updated while ComfyUI runs is not what it runs.
_sources = functools.cache(sources_of)
