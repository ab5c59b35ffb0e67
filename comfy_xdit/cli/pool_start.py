"""`comfy-xdit pool start`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from comfy_xdit.cost.measured import measure
from comfy_xdit.pool.client import Pool, status
from comfy_xdit.pool.devices import describe
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.handshake import KEY_VARIABLE
from comfy_xdit.pool.network import COORDINATOR_PORT, Network, network_on
from comfy_xdit.pool.transport import RPC, SOCKETS

POLL_S = 0.1

RPC_RISK = (
    "--transport rpc: torch's RPC listens on 127.0.0.1 and knows no passwords, so every user of this machine can end "
    "ComfyUI and the workers, and read and write files with your rights, as long as this pool runs\n"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--devices", default="auto", help="auto, cuda, cuda:0,1 or cpu:2 (default: auto)")
    parser.add_argument("--name", default="default", help="name of the pool (default: default)")
    parser.add_argument("--nodes", type=int, default=1, help="machines, each with --devices (default: 1, this one)")
    parser.add_argument("--interface", help="with --nodes: this machine's interface to the others, e.g. eth0")
    parser.add_argument(
        "--port", type=int, help=f"with --nodes: that workers come to (default: {COORDINATOR_PORT})"
    )
    parser.add_argument(
        "--transport",
        choices=(SOCKETS, RPC),
        help="between ComfyUI and the workers (default: sockets on one machine, rpc on several)",
    )
    parser.add_argument(
        "--service", help="module:Class that the workers run instead of their own (for tests)"
    )
    parser.add_argument("--path", action="append", default=[], help="folder for the workers' sys.path")


def run(args: argparse.Namespace) -> int:
    """Start the pool if it does not run, and return when its workers are up.

    A pool on several machines is left waiting for them, with what is to be run on each.
    """
    network = network_of(args)
    options: dict[str, Any] = {"path": tuple(args.path), "network": network, "transport": transport_of(args, network)}
    if args.service:
        options["service"] = args.service
    pool = Pool.connect(args.name, args.devices, start=True, **options)
    try:
        missing = status(args.name)["missing"]
        if pool.network is not None and missing:
            key = pool_folder(args.name).key
            sys.stdout.write(f"{missing_on(pool.network, pool.num_ranks, missing, key)}\n")
            return 0
        started = time.monotonic()
        found = wait_until_up(args.name)
        sys.stdout.write(
            f"pool {args.name!r}: {len(found['ranks'])} workers on {describe(pool.devices, pool.network)}, "
            f"up after {time.monotonic() - started:.1f} s; log: {found['log']}\n"
        )
        if not args.service:
            measured_now(pool)
    finally:
        pool.close()
    return 0


def network_of(args: argparse.Namespace) -> Network | None:
    """What --nodes, --interface and --port say. Raises PoolError for what makes no network."""
    if args.nodes == 1:
        for name in ("interface", "port"):
            if (value := getattr(args, name)) is not None:
                raise PoolError(
                    f"--{name} {value} is for a pool on several machines; add --nodes and how many they are, "
                    "or leave it out",
                    kind="input",
                )
        return None
    port = COORDINATOR_PORT if args.port is None else args.port
    return network_on(args.interface or "", num_machines=args.nodes, port=port)


def transport_of(args: argparse.Namespace, network: Network | None) -> str | None:
    """What --transport says, its risk told. Raises PoolError for one that the network does not go with."""
    if args.transport == SOCKETS and network is not None:
        raise PoolError(
            f"--transport {SOCKETS} is for one machine, and --nodes {args.nodes} are several; leave it out",
            kind="input",
        )
    if args.transport == RPC and network is None:
        sys.stdout.write(RPC_RISK)
    chosen: str | None = args.transport
    return chosen


def missing_on(network: Network, num_ranks: int, missing: str, key: Path) -> str:
    """Who is missing, and the command for each machine. key: the file with the pool's key, on this one."""
    num_devices = num_ranks // network.num_machines
    commands = (f"  {network.torchrun(num_devices, machine, key)}" for machine in range(network.num_machines))
    return "\n".join(
        [
            missing.partition(";")[0] + "; run on these machines, this one too, one command each "
            "(from a checkout: in its folder), with the torchrun of a Python that has comfy-xdit:",
            *commands,
            f"The pool's key is in {key}: copy that file to the other machines (scp -p), readable by you alone, and "
            f"name its place with --key-file; or set {KEY_VARIABLE} there to what is in it. Who has it is let in.",
        ]
    )


def measured_now(pool: Pool) -> None:
    """Have the links and devices measured while nobody waits, once for these devices."""
    link, device = measure(pool)
    between = "machines" if pool.network is not None else "ranks"
    links = f"{link.bytes_per_s / 1e9:.3g} GB/s between {between}, " if pool.num_ranks > 1 else ""
    sys.stdout.write(f"measured: {links}{device.flops_per_s / 1e12:.3g} TFLOP/s a rank\n")


def wait_until_up(name: str) -> dict[str, Any]:
    """The status of pool `name`, once all of its workers are up. Raises PoolError when they cannot start."""
    while True:
        found = status(name)
        if found["state"] in ("ready", "busy"):
            return found
        if found["missing"]:
            raise PoolError(found["missing"])
        if found["state"] == "failing":
            raise PoolError(
                f"the workers of pool {name!r} fail to start ({found['last_error'] or 'they end at once'}); "
                f"see {found['log']}, and end the pool with `comfy-xdit pool stop --name {name}`"
            )
        time.sleep(POLL_S)
