"""One rank of `bench vae`: decodes and encodes over gloo or NCCL, and counts what it held.

Arguments: rank, number of ranks, device, folder. The folder holds vae.safetensors and cases.pt, a list of
("decode" | "encode", input); the VAE has the dtype of the input. Rank 0 writes
results-<number of ranks>.pt: {"outputs": [output of each case], "ranks": [[a `Case` as a dict, for each
case], for each rank]}.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from comfy_xdit.messages import LoadVAE
from comfy_xdit.vae import ResidentVAE, load_vae

from .peak import ResidentPeak, TensorPeak

TIMEOUT = datetime.timedelta(seconds=300)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What one rank needed for one case. peak_bytes: tensors beside the weights, at the worst moment.

    resident_bytes: growth of the resident set; 0 on a GPU. has_result: whether the rank had the output.
    """

    kind: str
    seconds: float
    peak_bytes: int
    resident_bytes: int
    has_result: bool


def main(rank: int, num_ranks: int, device: str, folder: Path) -> None:
    """Run all cases as `rank`."""
    logging.basicConfig(level=logging.INFO)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
        store=dist.FileStore(str(folder / f"store-{num_ranks}"), num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=TIMEOUT,
    )
    outputs, mine = [], []
    # As the workers' service does.
    with torch.inference_mode():
        vaes: dict[str, ResidentVAE] = {}
        for kind, x in torch.load(folder / "cases.pt"):
            dtype = str(x.dtype).removeprefix("torch.")
            if dtype not in vaes:
                path = str(folder / "vae.safetensors")
                vaes[dtype] = load_vae(LoadVAE(vae=dtype, path=path, dtype=dtype), device)
                vaes[dtype].touch()
            out, case = measure(vaes[dtype], kind, x)
            outputs.append(out)
            mine.append(dataclasses.asdict(case))
    every: list[list[dict]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(every, mine)
    if rank == 0:
        torch.save({"outputs": outputs, "ranks": every}, folder / f"results-{num_ranks}.pt")
    dist.barrier()
    # Not Python's way out: a thread of gloo's that still runs then ends the process with an error.
    sys.stdout.flush()
    os._exit(0)


def measure(vae: ResidentVAE, kind: str, x: Tensor) -> tuple[Tensor | None, Case]:
    """The output of one case, and what it took on this rank."""
    run = vae.decode if kind == "decode" else vae.encode
    on_gpu = vae.device.type == "cuda"
    held = _held_on_gpu(vae) if on_gpu else 0
    dist.barrier()
    start = time.perf_counter()
    with TensorPeak() as tensors, ResidentPeak() as resident:
        out = run(x)
    case = Case(
        kind=kind,
        seconds=time.perf_counter() - start,
        peak_bytes=torch.cuda.max_memory_allocated(vae.device) - held if on_gpu else tensors.peak_bytes,
        resident_bytes=0 if on_gpu else resident.peak_bytes,
        has_result=out is not None,
    )
    return out, case


def _held_on_gpu(vae: ResidentVAE) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(vae.device)
    return torch.cuda.memory_allocated(vae.device)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
