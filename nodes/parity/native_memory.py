"""Where the weights of a model of ComfyUI's own class are: bytes for each rank, counted by the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_xdit_bench.memory import rollup
from comfy_xdit_nodes.parity.measure import setting_of
from comfy_xdit_nodes.parity.native_speed import SIZES, model_of, run_steps
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.pool import connect

from comfy_xdit.pool.stop import stop

FIRST, MEASURED = "wan", "qwen-image"


def memory(folder: Path, *, degrees: list[dict[str, int]]) -> dict[str, Any]:
    """A row for each rank of a pool for each of `degrees`, before and after the load and two steps.

    Another model runs first, on the same pool: what a first job imports is no weight. resident_grew_bytes and
    share_grew_bytes are what the kernel says (Rss and Pss of smaps_rollup); Pss deals shared pages out.
    """
    first, model = model_of(folder, FIRST), model_of(folder, MEASURED)
    file_bytes = (folder / f"{MEASURED}.safetensors").stat().st_size
    rows = []
    for chosen in degrees:
        num_ranks = 1
        for degree in chosen.values():
            num_ranks *= degree
        setting = setting_of(num_ranks, **chosen)
        run_steps(parallelize(first, setting), FIRST, (1, 16, 1, 16, 16))
        pids = [rank["pid"] for rank in connect(setting).status()["ranks"]]
        before = [rollup(pid) for pid in pids]
        run_steps(parallelize(model, setting), MEASURED, (1, 16, 1, 16, 16))
        after = [rollup(pid) for pid in pids]
        stop(setting.name)
        rows += [
            {
                "degrees": " x ".join(f"{axis}={degree}" for axis, degree in chosen.items()),
                "rank": rank,
                "resident_grew_bytes": after[rank]["Rss"] - before[rank]["Rss"],
                "share_grew_bytes": after[rank]["Pss"] - before[rank]["Pss"],
            }
            for rank in range(num_ranks)
        ]
    kind, config, _ = SIZES[MEASURED]
    return {
        "compared": f"CPU ranks with a {kind} of {config['num_layers']} blocks in fp32, before and after two steps",
        "file_bytes": file_bytes,
        "rows": rows,
    }
