"""Reach a running pool, or start one."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import subprocess
import sys
import time
from typing import Any

from ..mount import BOOT
from ..quoted import quoted
from .devices import describe, parse_devices
from .environment import hidden
from .errors import PoolError
from .folder import PoolFolder, pool_folder, unwritable, where_log
from .locks import holders
from .network import Network
from .transport import RPC, SOCKETS, Poll
from .wire import Wire, spell, versions

log = logging.getLogger("comfy_xdit")

SERVICE = "comfy_xdit_worker.service:Service"
HELLO_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0

EARLIER_LIMIT_S = 10.0
"""How long a new pool waits for an earlier one of its name that nobody can reach."""

POLL_S = 0.05


def devices_of(text: str) -> list[str]:
    """`parse_devices`, with the sentence as a PoolError."""
    try:
        return parse_devices(text)
    except ValueError as error:
        raise PoolError(str(error), kind="input") from None


def say(
    folder: PoolFolder, message: dict[str, Any], *, timeout_s: float = HELLO_TIMEOUT_S
) -> tuple[Wire, dict[str, Any]]:
    """Open the coordinator with `message`: the connection and the first answer.

    Raises ConnectionError when no pool is behind the coordinator, PoolError when it does not answer.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(TimeoutError):
        try:
            wire = Wire.connect(folder.socket, timeout_s=timeout_s)
        except TimeoutError:
            # Somebody listens, and lets nobody in: that is no pool that is gone.
            raise
        except OSError as error:
            raise ConnectionError(str(error)) from None
        try:
            wire.send(message)
            while time.monotonic() < deadline:
                for answer in wire.wait(POLL_S * 10):
                    return wire, answer
        except (ConnectionError, ValueError) as error:
            wire.close()
            raise ConnectionError(str(error)) from None
        wire.close()
    raise PoolError(
        f"pool {folder.name!r} does not answer; "
        f"end it with `comfy-xdit pool stop --name {folder.name}` and run again"
    )


def reach(
    name: str, devices: str, *, start: bool, poll: Poll = None, was: Network | None = None, **options: Any
) -> tuple[Wire, dict[str, Any]]:
    """A client's connection to the pool `name` and what the pool says about itself.

    start: start a pool on `devices` when none runs. was: what it was on before; one on several machines is not
    replaced by one on this machine alone. options: of `spawn`; with a `network`, `devices` are those of each machine.
    Raises PoolError: no pool, another version, other devices or machines than asked for, a bad `devices`.
    """
    network: Network | None = options.get("network")
    # Before anything is made or started, so that a mistake has no consequence.
    wanted = devices_of(devices) * (network.num_machines if network else 1)
    folder = pool_folder(name)
    try:
        wire, about = say(folder, {"type": "client"})
    except ConnectionError:
        if was is not None and not network:
            raise PoolError(
                f"pool {name!r} on {was.num_machines} machines has ended; start it again with "
                f"`comfy-xdit pool start --name {name} --nodes {was.num_machines}`, or give another pool name"
            ) from None
        if not start:
            raise PoolError(
                f"no pool {name!r} runs; start it with `comfy-xdit pool start --name {name}`"
            ) from None
        wire, about = _start(folder, wanted, poll, options)
    try:
        _check(name, about, None if devices.strip().lower() == "auto" and not network else wanted, network)
        _check_transport(name, about, options.get("transport"))
    except PoolError:
        wire.close()
        raise
    return wire, about


def _check(name: str, about: dict[str, Any], wanted: list[str] | None, network: Network | None) -> None:
    stop = f"stop it with `comfy-xdit pool stop --name {name}` and run again"
    mine, theirs = versions(), about.get("versions")
    if theirs != mine:
        raise PoolError(
            f"pool {name!r} runs another version ({spell(theirs)}) than you do ({spell(mine)}); {stop}"
        )
    found = Network(**about["network"]) if about["network"] else None
    if wanted is not None and (wanted, network) != (about["devices"], found):
        raise PoolError(
            f"pool {name!r} runs on {describe(about['devices'], found)}, not on {describe(wanted, network)}; "
            f"{stop}, or give devices=auto to use it as it is, or another pool name",
            kind="input",
        )


def _check_transport(name: str, about: dict[str, Any], wanted: str | None) -> None:
    if wanted not in (None, about["transport"]):
        raise PoolError(
            f"pool {name!r} runs with --transport {about['transport']}, not {wanted}; stop it with "
            f"`comfy-xdit pool stop --name {name}` and run again, or leave --transport out to use it as it is",
            kind="input",
        )


def _start(
    folder: PoolFolder, devices: list[str], poll: Poll, options: dict[str, Any]
) -> tuple[Wire, dict[str, Any]]:
    began = time.monotonic()
    while time.monotonic() < began + START_TIMEOUT_S:
        if poll is not None:
            poll()
        with folder.try_lock("start") as free:
            try:
                # Another client may have been faster.
                return say(folder, {"type": "client"})
            except ConnectionError:
                pass
            earlier = holders(folder.lock("alive").path) if free else []
            if earlier and time.monotonic() > began + EARLIER_LIMIT_S:
                raise PoolError(
                    f"an earlier pool {folder.name!r} (process {earlier[0]}) still runs, but can't be reached; "
                    f"end it with `comfy-xdit pool stop --name {folder.name}` and run again"
                )
            # One whose folder was deleted makes it anew, and one that ends is soon gone.
            if free and not earlier:
                if said := hidden(os.environ):
                    log.warning("%s", said)
                log.info("starting pool %r on %s", folder.name, describe(devices, options.get("network")))
                spawn(folder, devices, **options)
                return say(folder, {"type": "client"})
        time.sleep(POLL_S)
    raise PoolError(
        f"pool {folder.name!r} is still being started after {START_TIMEOUT_S:.0f} s; {where_log(folder.name)}"
    )


def spawn(
    folder: PoolFolder,
    devices: list[str],
    *,
    service: str = SERVICE,
    path: tuple[str, ...] = (),
    network: Network | None = None,
    transport: str | None = None,
) -> None:
    """Start a supervisor and return when its coordinator is open.

    devices: one for each rank. service: "module:Class" that the workers run; path: folders for their sys.path.
    network: to the machines whose own torchruns start the workers; None starts them here. transport: between client
    and workers, by default sockets on one machine and RPC on several.
    Raises PoolError with what it says when it ends instead.
    """
    read_end, write_end = os.pipe()
    command = [sys.executable, str(BOOT), "comfy_xdit.pool.supervisor", "--name", folder.name]
    command += ["--devices", json.dumps(devices), "--service", service, "--ready-fd", str(write_end)]
    command += ["--transport", transport or (RPC if network else SOCKETS)]
    if network is not None:
        command += ["--network", json.dumps(network.fields)]
    for entry in path:
        command += ["--path", entry]
    try:
        # Appended to: it may be that of a pool that runs. The one that is started empties it, once it has the place.
        with open(folder.log, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(write_end,),
                cwd="/",
            )
        os.close(write_end)
        write_end = -1
        process.wait(START_TIMEOUT_S)
        answer = os.read(read_end, 4096) if select.select([read_end], [], [], START_TIMEOUT_S)[0] else b""
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise unwritable(folder, error) from None
        raise _cannot_start(folder, error.strerror or "unknown error") from None
    except subprocess.TimeoutExpired:
        raise _cannot_start(folder, f"its first process still runs after {START_TIMEOUT_S:.0f} s") from None
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)
    if answer != b"ready\n":
        why = answer.decode(errors="replace").strip() or log_end(folder)
        raise PoolError(f"pool {folder.name!r} ended while it started: {quoted(why)}; {where_log(folder.name)}")


def _cannot_start(folder: PoolFolder, why: str) -> PoolError:
    return PoolError(f"cannot start pool {folder.name!r}: {why}")


def log_end(folder: PoolFolder) -> str:
    """The last line of the pool's log that says something."""
    try:
        lines = folder.log.read_text(errors="replace").split("\n")
    except OSError:
        return "it left no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
