"""Measure parity in one ComfyUI checkout; started by `comfy-xdit parity` with that checkout's Python.

Also times what only a ComfyUI can be compared with. Writes one JSON object per result to standard output, and
nothing else.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--samplers", nargs="*")
    parser.add_argument("--modes", nargs="+", type=int, metavar="RANKS", help="measure modes of so many ranks instead")
    parser.add_argument("--lora", nargs=2, type=int, metavar=("RANKS", "TURNS"), help="time LoRA switching instead")
    parser.add_argument("--skeleton", action="store_true", help="measure what a MODEL costs ComfyUI instead")
    parser.add_argument("--native", type=json.loads, help="time ComfyUI's own classes instead; arguments as JSON")
    parser.add_argument("--native-memory", type=json.loads, help="count their bytes instead; arguments as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="comfy-xdit-parity-") as base:
        # These pools are not the user's.
        os.environ["COMFY_XDIT_HOME"] = f"{base}/pools"
        enter = runpy.run_path(str(Path(__file__).resolve().parent / "host.py"))["enter"]
        enter(args.comfyui, f"{base}/comfyui")
        try:
            folder = Path(base) / "comfyui" / "models" / "diffusion_models"
            if args.skeleton:
                from comfy_xdit_nodes.parity.skeleton_memory import skeleton_memory

                sys.stdout.write(json.dumps(skeleton_memory(folder)) + "\n")
            elif args.lora:
                measure_lora(folder, *args.lora)
            elif args.native:
                measure_native(folder, args.native)
            elif args.native_memory:
                measure_native_memory(folder, args.native_memory)
            elif args.modes:
                measure_modes(folder, args.modes)
            else:
                measure_all(folder, args.samplers)
        finally:
            stop_pools()


def measure_all(folder: Path, samplers: list[str] | None) -> None:
    from comfy_xdit_nodes.parity import measure

    with compared(folder) as parity:
        for case in measure.CASES:
            for kind in measure.KINDS:
                write(parity.measure(kind, case, samplers or None))


def measure_modes(folder: Path, numbers: list[int]) -> None:
    from comfy_xdit_bench.modes import modes
    from comfy_xdit_nodes.parity import measure

    with compared(folder) as parity:
        for num_ranks in numbers:
            for spec in modes(num_ranks):
                for kind in measure.KINDS:
                    write(parity.measure_mode(kind, spec))
            stop_pools(measure.setting_of(num_ranks).name)


@contextlib.contextmanager
def compared(folder: Path) -> Iterator[Any]:
    """Stock's models and ours, of `measure.KINDS`."""
    import torch
    from comfy_xdit_nodes.parity import measure, models

    torch.set_num_threads(1)
    models.write_all(folder)
    with torch.inference_mode():
        yield measure.Parity(folder)


def write(results: Iterable[Any]) -> None:
    for result in results:
        sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
        sys.stdout.flush()


def measure_lora(folder: Path, num_ranks: int, num_turns: int) -> None:
    import torch
    from comfy_xdit_nodes.parity.lora import switching

    torch.set_num_threads(1)
    with torch.inference_mode():
        sys.stdout.write(json.dumps(switching(folder, num_ranks=num_ranks, num_turns=num_turns)) + "\n")


def measure_native(folder: Path, asked: dict[str, Any]) -> None:
    import torch
    from comfy_xdit_nodes.parity.native_speed import speed

    torch.set_num_threads(1)
    with torch.inference_mode():
        sys.stdout.write(json.dumps(speed(folder, **asked)) + "\n")


def measure_native_memory(folder: Path, asked: dict[str, Any]) -> None:
    import torch
    from comfy_xdit_nodes.parity.native_memory import memory

    with torch.inference_mode():
        sys.stdout.write(json.dumps(memory(folder, **asked)) + "\n")


def stop_pools(*names: str) -> None:
    """Those of these names; without, all that a measurement may have started."""
    from comfy_xdit_nodes.parity.measure import setting_of

    from comfy_xdit.pool.stop import stop

    for name in names or ("lora", *(setting_of(num_ranks).name for num_ranks in (1, 2, 3, 4, 8))):
        with contextlib.suppress(ConnectionError):
            stop(name)


if __name__ == "__main__":
    main()
