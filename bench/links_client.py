"""The client of `bench links`, a process on the first of two machines: sets the link's speed, and measures.

`boot.py comfy_xdit_bench.links_client SETTINGS`, as JSON; writes what it found as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch

from comfy_xdit.cost.arithmetic import read_network
from comfy_xdit.cost.choose import Prediction, predict
from comfy_xdit.cost.links import Device, Links, link_named
from comfy_xdit.cost.measured import links_of
from comfy_xdit.cost.work import Work
from comfy_xdit.messages import LoadModel, Probe
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool

from .bench_pool import relative_difference
from .checkpoint import FluxSize, random_call
from .links import METHODS
from .namespaces import Machine
from .program import whole_run

RUN_TIMEOUT_S = 3600.0

SPECS = {axis: ParallelSpec(**{axis: 2}) for axis in METHODS}


def main(told: dict[str, Any]) -> None:
    pool = Pool.connect("default", start=False)
    bench = Bench(pool, told)
    try:
        with pool.lease():
            for spec in SPECS.values():
                pool.call(bench.load(spec), timeout_s=RUN_TIMEOUT_S)
            for gbit in told["rates"]:
                bench.measure(gbit)
    finally:
        pool.close()
    sys.stdout.write(json.dumps(bench.found()))


class Bench:
    """One job, run by every method over every link."""

    def __init__(self, pool: Pool, told: dict[str, Any]) -> None:
        self._pool, self._path, self._num_turns = pool, told["path"], told["num_turns"]
        self._machines = [Machine(**fields) for fields in told["machines"]]
        self._call = random_call(FluxSize(**told["size"]), tokens=told["tokens"], batch=2)
        self._network = read_network(self._path)
        height, width = self._call["x"].shape[-2:]
        self._work = Work(
            latent=(height, width),
            text_tokens=self._call["context"].shape[1],
            chunks=2,
            element_bytes=4,
            num_evaluations=told["num_evaluations"],
        )
        self._probes: dict[float, dict[str, Any]] = {}
        self._seconds: dict[float, dict[str, list[float]]] = {}
        self._samples: dict[str, torch.Tensor] = {}

    def load(self, spec: ParallelSpec) -> LoadModel:
        """The model as `spec` spreads it, beside the others'."""
        dtype = "float32"
        return LoadModel(
            model=str(spec),
            path=self._path,
            prefix="",
            family="flux",
            storage_dtype=dtype,
            compute_dtype=dtype,
            spec=spec,
        )

    def measure(self, gbit: float) -> None:
        """Make the link so fast, in each direction; have the ranks probe it, and run every method."""
        for machine in self._machines:
            machine.shape(gbit * 1e9)
        self._probes[gbit] = self._pool.call(Probe(), timeout_s=RUN_TIMEOUT_S).value
        seconds = self._seconds[gbit] = {axis: [] for axis in SPECS}
        # One turn first that is not counted, and short: buffers and connections are made.
        for turn in range(self._num_turns + 1):
            for axis in SPECS if turn % 2 else reversed(SPECS):
                once, self._samples[axis] = self._run(axis, 2 if turn == 0 else self._work.num_evaluations)
                if turn:
                    seconds[axis].append(once)
        sys.stderr.write(f"{gbit:g} Gbit/s is done\n")

    def found(self) -> dict[str, Any]:
        """rows: for each link and method what was measured, and predicted: from the link's name, and from what the
        ranks probed. links: what they probed.
        """
        rows = []
        for gbit, seconds in self._seconds.items():
            named, probed = (self._predicted(link) for link in (link_named(f"ethernet-{gbit:g}"), self._link(gbit)))
            rows += [
                {
                    "gbit": gbit,
                    "method": str(spec),
                    "measured_s": statistics.median(seconds[axis]),
                    "predicted_s": named[axis].step_s,
                    "probed_s": probed[axis].step_s,
                    "compute_s": named[axis].compute_s,
                    "sent_MB": named[axis].sent_bytes / 1e6,
                    "difference": relative_difference(self._samples[axis], self._samples["cfg"]),
                }
                for axis, spec in SPECS.items()
            ]
        links = [
            {
                "gbit": gbit,
                **{f"{name} MB/s": rate / 1e6 for name, rate in probe["across"]["bytes_per_s"].items()},
                "latency ms": max(probe["across"]["latency_s"].values()) * 1e3,
            }
            for gbit, probe in self._probes.items()
        ]
        return {"rows": rows, "links": links}

    def _predicted(self, link: Links) -> dict[str, Prediction]:
        # What else runs on the machine can only slow a probe down.
        flops_per_s = max(probe["flops_per_s"] for probe in self._probes.values())
        device = Device(name="cpu", flops_per_s=flops_per_s, memory_bytes=1e12)
        return {axis: predict(self._network, self._work, spec, link, device) for axis, spec in SPECS.items()}

    def _link(self, gbit: float) -> Links:
        return links_of(f"{gbit:g} Gbit/s", self._probes[gbit])

    def _run(self, axis: str, num_evaluations: int) -> tuple[float, torch.Tensor]:
        """Seconds of an evaluation, and the samples.

        From when the last rank has begun: what it was sent for the job took the same link.
        """
        spec = SPECS[axis]
        message = whole_run(str(spec), self._call, spec, num_evaluations=num_evaluations, chunks=2)
        results = self._pool.call_all(message, timeout_s=RUN_TIMEOUT_S)
        seconds = min(result.report["seconds"] for result in results)
        return seconds / num_evaluations, results[0].value


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
