"""The plan's order of methods beside the measured one, on two machines whose link is made slower step by step.

The machines are network namespaces of this one (see `namespaces`), which takes root and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comfy_xdit.mount import BOOT, ROOT
from comfy_xdit.pool.errors import PoolError

from .checkpoint import FluxSize, write_flux
from .namespaces import Machine, Unavailable, two_machines
from .show import json_argument, show

METHODS = ("cfg", "ulysses", "ring", "tensor", "pipe", "distri")

RATES = (0.05, 0.2, 0.5, 2.0)
"""Gbit/s: from where only the methods that send little are worth it, to where the link hardly counts."""

PREDICTED = ("predicted", "probed")
"""From the link's name, as `comfy-xdit plan --link` does; and from what the ranks probed, as `auto` degrees are."""

TIE = 0.15
"""Predictions of two methods that are nearer than this share of the smaller one say that either may be faster."""

COMFY_XDIT = [sys.executable, str(BOOT), "comfy_xdit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """rates: of the link, Gbit/s. Every method runs the same job: one picture, cond and uncond."""

    rates: tuple[float, ...] = RATES
    num_turns: int = 3
    num_evaluations: int = 6
    tokens: int = 512
    size: FluxSize = dataclasses.field(
        default_factory=lambda: FluxSize(hidden=512, double_blocks=2, single_blocks=4)
    )


def links(settings: Settings) -> dict[str, Any]:
    """A row for each link and method, both orders for each link, and the pairs on which they don't agree.

    Raises ValueError where two machines can't be made.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="comfy-xdit-bench-") as home, two_machines() as (a, b):
            environment = os.environ | {"COMFY_XDIT_HOME": home, "OMP_NUM_THREADS": "1"}
            path = str(write_flux(Path(home) / "links.safetensors", settings.size))
            with pool_on(a, b, environment):
                told = {"path": path, "machines": [dataclasses.asdict(machine) for machine in (a, b)]}
                found = _measured(a, {**dataclasses.asdict(settings), **told}, environment)
    except Unavailable as reason:
        raise ValueError(f"this benchmark needs two machines: {reason}") from None
    size = settings.size
    return {
        "compared": (
            f"seconds of an evaluation in runs of {settings.num_evaluations} (Euler, cond and uncond) of a random Flux "
            f"(hidden {size.hidden}, {size.double_blocks} + {size.single_blocks} blocks, {settings.tokens} image "
            "tokens) on 2 ranks of 1 thread, each on a machine of its own: measured, and as predicted for that link"
        ),
        "rows": found["rows"],
        "links": found["links"],
        "orders": orders(found["rows"]),
        "disagreements": disagreements(found["rows"]),
        "tie": TIE,
    }


@contextlib.contextmanager
def pool_on(
    a: Machine, b: Machine, environment: dict[str, str], *, before_b: Sequence[str] = ()
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A pool "default" with its head on `a` and a rank on each: the torchruns, started as `pool start` says.

    before_b: words that come before b's command. Raises PoolError with what `pool start` said when it fails.
    """
    torchrun = {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    start = [*COMFY_XDIT, "pool", "start", "--nodes", "2", "--devices", "cpu:1", "--interface", a.interface]
    done = subprocess.run(a.command(start), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PoolError(f"no pool could be started on two machines: {done.stderr.strip() or 'it said nothing'}")
    one, two = (line.split() for line in done.stdout.splitlines() if line.strip().startswith("torchrun"))
    started = [
        subprocess.Popen(machine.command(command), cwd=ROOT, env=torchrun)
        for machine, command in ((a, one), (b, [*before_b, *two]))
    ]
    try:
        yield started
    finally:
        subprocess.run(a.command([*COMFY_XDIT, "pool", "stop"]), env=environment, stdout=subprocess.DEVNULL)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _measured(a: Machine, told: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What a client on machine `a` finds. Raises PoolError when it ends early."""
    command = [sys.executable, str(BOOT), "comfy_xdit_bench.links_client", json.dumps(told)]
    done = subprocess.run(a.command(command), env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise PoolError("the measuring process ended early; what it said is above")
    return dict(json.loads(done.stdout))


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each link the methods from the fastest to the slowest: as measured, and by both predictions."""
    found = []
    for gbit, of_link in itertools.groupby(rows, key=lambda row: row["gbit"]):
        group = list(of_link)
        for name in ("measured", *PREDICTED):
            methods = " ".join(row["method"] for row in sorted(group, key=lambda row: row[f"{name}_s"]))
            found.append({"gbit": gbit, "order": name, "methods": methods})
    return found


def disagreements(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of methods whose predictions are no tie and whose measured order is the other one."""
    found = []
    for gbit, of_link in itertools.groupby(rows, key=lambda row: row["gbit"]):
        for pair, name in itertools.product(itertools.combinations(list(of_link), 2), PREDICTED):
            fast, slow = sorted(pair, key=lambda row: row[f"{name}_s"])
            predicted, measured = (slow[f"{kind}_s"] / fast[f"{kind}_s"] for kind in (name, "measured"))
            if predicted > 1 + TIE and measured < 1:
                pair_told = {"faster": fast["method"], "slower": slow["method"]}
                found.append({"gbit": gbit, "by": name, **pair_told, "predicted": predicted, "measured": measured})
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(RATES), help="of the link, Gbit/s (default: %(default)s)"
    )
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each method (default: 3)")
    parser.add_argument("--evaluations", type=int, default=6, help="in each run (default: 6)")
    parser.add_argument("--tokens", type=int, default=512, help="image tokens (default: 512)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when the orders disagree. Raises ValueError for bad numbers."""
    for name, least in (("turns", 1), ("evaluations", 3), ("tokens", 16)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is too few; use {least} or more")
    if not all(0.001 <= rate <= 100 for rate in args.rates):
        raise ValueError(f"--rates {args.rates} are not all rates that a link can be given; use 0.001 to 100 Gbit/s")
    settings = Settings(
        rates=tuple(args.rates), num_turns=args.turns, num_evaluations=args.evaluations, tokens=args.tokens
    )
    result = links(settings)
    show(result, as_json=args.json)
    return int(bool(result["disagreements"]))
