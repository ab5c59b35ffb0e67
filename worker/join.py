"""`comfy-xdit pool join`: a worker of a pool on several machines, started by the torchrun of its machine."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from comfy_xdit.pool.environment import hidden, settle
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.handshake import KEY_VARIABLE, given_key, prove
from comfy_xdit.pool.network import addresses, interface_of, listed, place_of
from comfy_xdit.pool.start import SERVICE
from comfy_xdit.pool.wire import Wire, versions

from .rank import become, prepare

log = logging.getLogger("comfy_xdit")

COORDINATOR_WAIT_S = 60.0
"""How long a worker looks for a coordinator: a killed one may be started again. Counted anew after waiting at one."""

TRY_EVERY_S, BEAT_S = 1.0, 1.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("coordinator", metavar="HOST:PORT", help="as `comfy-xdit pool start --nodes` printed it")
    parser.add_argument(
        "--node-rank", type=int, help="which of the pool's machines this is, from 0 (default: torchrun's --node-rank)"
    )
    parser.add_argument(
        "--key-file", type=Path, help=f"with the pool's key, as `comfy-xdit pool start` says (default: ${KEY_VARIABLE})"
    )
    parser.add_argument("--interface", help="to the other machines (default: the one that leads to the coordinator)")
    parser.add_argument("--service", default=SERVICE, help="module:Class that the worker runs (for tests)")
    parser.add_argument("--path", action="append", default=[], help="folder for sys.path")


def run(args: argparse.Namespace) -> int:
    """Be a worker until the pool ends. Raises PoolError when torchrun did not start it."""
    if any(name not in os.environ for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")):
        raise PoolError("`pool join` is for torchrun; use the command that `comfy-xdit pool start --nodes` printed")
    prepare(args.path)
    num_local = int(os.environ["LOCAL_WORLD_SIZE"])
    greeting = {
        "type": "worker",
        "machine": int(os.environ["GROUP_RANK"]) if args.node_rank is None else args.node_rank,
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "num_local": num_local,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": versions(),
    }
    try:
        place = place_of(args.coordinator)
        key = given_key(args.key_file, os.environ)
        # What this process starts has no need of it.
        os.environ.pop(KEY_VARIABLE, None)
        wire, interface, welcome = _come_in(place, key, greeting, args.interface)
    except PoolError as error:
        _give_up(str(error))
    changes = settle(os.environ, interface=interface, nccl_interface=f"={interface}")
    for said in filter(None, (str(changes), hidden(os.environ))):
        log.warning("%s", said)
    become(wire, welcome, service=args.service, interface=interface, num_local=num_local)
    return 1


def _come_in(
    place: tuple[str, int], key: bytes, greeting: dict[str, Any], interface: str | None
) -> tuple[Wire, str, dict[str, Any]]:
    """The connection, the interface and the welcome, once all ranks are there.

    interface: as the user named it. Raises PoolError when there is no coordinator, or this worker is not wanted.
    """
    why, deadline = "", time.monotonic() + COORDINATOR_WAIT_S
    while time.monotonic() < deadline:
        try:
            wire = Wire.connect(place)
        except OSError as error:
            why = (
                f"no pool is at {place[0]}:{place[1]} ({error.strerror or error}); "
                "start it with `comfy-xdit pool start --nodes`, then torchrun again"
            )
        else:
            found = _interface(wire, interface)
            answer = _answer(wire, key, greeting)
            if answer["type"] == "welcome":
                return wire, found, answer
            wire.close()
            if answer["type"] == "end":
                os._exit(0)
            why = answer["reason"]
            if answer["type"] == "closed":
                deadline = time.monotonic() + COORDINATOR_WAIT_S
            elif not answer["again"]:
                break
        time.sleep(TRY_EVERY_S)
    raise PoolError(why)


def _interface(wire: Wire, named: str | None) -> str:
    """The interface that other machines reach this one through. Raises PoolError when there is none such."""
    own = addresses()
    found = named or interface_of(wire.sock.getsockname()[0])
    if found not in own:
        raise PoolError(
            f"{found or 'the way to the coordinator'} is no interface of this machine with an IPv4 address; "
            f"name one with --interface: it has {listed(own)}"
        )
    return found


def _answer(wire: Wire, key: bytes, greeting: dict[str, Any]) -> dict[str, Any]:
    """What the coordinator says in the end; as long as others are missing it says nothing.

    "closed": the coordinator was lost after it had let this worker wait. Raises PoolError for one without the key.
    """
    let_wait = False
    try:
        prove(wire, key)
        wire.send(greeting)
        while True:
            if messages := wire.wait(BEAT_S):
                return next((message for message in messages if message["type"] == "end"), messages[0])
            wire.send({"type": "beat"})
            let_wait = True
    except (ConnectionError, ValueError) as error:
        kind = "closed" if let_wait else "refused"
        return {"type": kind, "reason": f"the pool's coordinator closed the connection ({error})", "again": True}


def _give_up(reason: str) -> NoReturn:
    """End, and have torchrun end: after any other status it would start this process again, for ever."""
    sys.stderr.write(f"comfy-xdit: {reason}\n")
    sys.stderr.flush()
    os._exit(0)
