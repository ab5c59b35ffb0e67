"""One rank of a decode and encode over gloo, run as a script by test_vae_ranks.py.

Arguments: rank, number of ranks, folder. The folder holds vae.safetensors and cases.pt, a list of
("decode" | "encode", input). Rank 0 writes results-<n>.pt: the outputs, and of every rank the tensor
bytes at its peak in each case and what it returned.
"""

import datetime
import logging
import os
import runpy
import sys
from pathlib import Path


def main(rank: int, num_ranks: int, folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.basicConfig(level=logging.INFO)
    mount = Path(__file__).resolve().parent.parent / "comfy_xdit" / "mount.py"
    runpy.run_path(str(mount))["mount"]("comfy_xdit")
    import torch
    import torch.distributed as dist

    from comfy_xdit.bench.peak import TensorPeak
    from comfy_xdit.messages import LoadVAE
    from comfy_xdit.vae import load_vae

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{num_ranks}"), num_ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=datetime.timedelta(seconds=120)
    )
    vae = load_vae(LoadVAE(vae="v", path=str(folder / "vae.safetensors"), dtype="float32"), "cpu")
    outputs, mine = [], []
    for kind, x in torch.load(folder / "cases.pt"):
        with TensorPeak() as peak:
            out = vae.decode(x) if kind == "decode" else vae.encode(x)
        outputs.append(out)
        mine.append((peak.peak_bytes, out is None))
    every: list = [None] * num_ranks
    dist.all_gather_object(every, mine)
    if rank == 0:
        torch.save({"outputs": outputs, "ranks": every}, folder / f"results-{num_ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
