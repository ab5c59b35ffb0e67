"""What reaches a pool on one machine: text and tensors of its own user, at its coordinator and nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import torch
from fault_service import Echo, Reduce
from harness import private_pool, wait_until, worker_pids

from comfy_xdit.messages import Failure, decode, encode
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.wire import MAX_LINE_BYTES, Wire

LISTEN, ACCEPTS = "0A", 0x10000
"""A listening TCP socket's state, and a listening unix socket's flag, in /proc/net (Linux' tcp_states.h, net.h)."""

LOOPBACK = "0100007F"
"""127.0.0.1, in a machine's byte order."""


@pytest.fixture(scope="module")
def pool():
    with private_pool() as pool:
        pool.call(Echo(value=1))
        yield pool


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "malformed message"),
        ("[" * 100_000, "malformed message"),
        ('"text"', "is no message"),
        ('{"$": "Popen", "args": ["touch"]}', "unknown message 'Popen'"),
        ('{"$": "Echo"}', "malformed Echo"),
        ('{"$": "Echo", "value": {"$tensor": 3}}', "tensor 3 of 0"),
    ],
)
def test_bad_messages_are_answered_with_a_failure(pool, text, sentence):
    pids = worker_pids(pool)
    with pool.lease():
        pool._serial += 1
        for rank, future in enumerate(pool._group.send(range(2), pool._serial, text, [])):
            failure = decode(*future.result(60))
            assert isinstance(failure, Failure) and failure.rank == rank and failure.kind == "input"
            assert sentence in failure.message
        assert pool.call(Reduce(value=1.0)).value == 2.0
    assert worker_pids(pool) == pids


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b"\xff\xfe\n",
        b"{}\n",
        b'{"type": "worker"}\n',
        b'{"type": "worker", "rank": 0, "attempt": -1}\n',
        b'{"type": "worker", "rank": 99, "attempt": 0}\n',
        b"x" * (MAX_LINE_BYTES + (1 << 17)),
    ],
    ids=lambda line: line[:40].decode(errors="replace").strip(),
)
def test_the_coordinator_drops_who_talks_nonsense(pool, line):
    wire = Wire.connect(pool_folder(pool.name).socket)
    try:
        with contextlib.suppress(OSError):
            wire.sock.sendall(line)
        wait_until(lambda: _is_closed(wire), "the coordinator to hang up")
    finally:
        wire.close()
    assert pool.call(Echo(value=1)).value == 1


def _is_closed(wire):
    try:
        return wire.wait(0.1) and False
    except ConnectionError:
        return True


def test_a_line_in_pieces_is_read_whole(pool):
    wire = Wire.connect(pool_folder(pool.name).socket)
    try:
        for byte in json.dumps({"type": "status"}).encode() + b"\n":
            wire.sock.sendall(bytes([byte]))
        assert wait_until(lambda: wire.wait(0.1), "the status")[0]["name"] == pool.name
    finally:
        wire.close()


def test_the_folder_is_private(pool):
    folder = pool_folder(pool.name)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.socket.stat().st_mode & 0o777 == 0o600


def test_no_object_of_ours_is_pickled():
    text, tensors = encode(Echo(value={"x": torch.nn.Parameter(torch.ones(2))}))
    assert isinstance(text, str) and [type(tensor) for tensor in tensors] == [torch.Tensor]


# What listens, and what a stranger can do to it


def sockets_of(pid):
    """The inodes of a process' sockets."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                yield target[len("socket:[") : -1]


def listening(pid):
    """(table, address, port) of what a process listens at, or a UDP socket of its: Linux' proc_net(5)."""
    own = set(sockets_of(pid))
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if rest[5] in own and (state == LISTEN or table.startswith("udp")):
                address, _, port = local.rpartition(":")
                yield table, address, int(port, 16)
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *path = line.split()
        if inode in own and (int(flags, 16) & ACCEPTS or (path and path[0].startswith("@"))):
            yield "unix", path[0] if path else "", 0


def processes(pool):
    found = pool.status()
    return {"client": [os.getpid()], "supervisor": [found["pid"]], "workers": [r["pid"] for r in found["ranks"]]}


def ports_of(pool):
    """What listens in the pool and its client, held against the table of docs/pool.md. The ports."""
    who = processes(pool)
    assert not list(listening(*who["client"]))
    assert list(listening(*who["supervisor"])) == [("unix", str(pool_folder(pool.name).socket), 0)]
    of_workers = [found for pid in who["workers"] for found in listening(pid)]
    assert {(table, address) for table, address, _ in of_workers} == {("tcp", LOOPBACK)}, "gloo's, and nothing else"
    return [port for _, _, port in of_workers]


@contextlib.contextmanager
def stranger(pool, ports):
    """Another user, who has thrown everything and still holds its connections."""
    script = Path(__file__).resolve().parent / "faults" / "stranger.py"
    command = [sys.executable, str(script), str(pool_folder(pool.name).socket), *map(str, ports)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_stranger_is_let_in_nowhere_and_ends_nothing(pool):
    before, generation = processes(pool), pool.generation
    assert pool.call(Reduce(value=1.0)).value == 2.0
    with stranger(pool, ports_of(pool)) as other:
        coordinator, thrown = other.stdout.readline().strip(), other.stdout.readline().split()
        if os.getuid() == 0:
            assert coordinator == "coordinator PermissionError"
        assert thrown[0] == "thrown" and int(thrown[1]) > 0
        assert pool.call(Reduce(value=2.0, rounds=50)).value == 4.0
        # While it comes again, in the middle of a job.
        with stranger(pool, ports_of(pool)):
            assert pool.call(Reduce(value=1.5, rounds=2000)).value == 3.0
    assert pool.call(Reduce(value=2.5)).value == 5.0
    assert processes(pool) == before and pool.generation == generation
    ports_of(pool)


def test_a_pool_on_one_machine_starts_no_rpc(pool):
    from torch.distributed.rpc import api

    assert pool.call(Echo(value=1)).value == 1
    assert not api._is_current_rpc_agent_set()
    for pid in processes(pool)["workers"]:
        names = {(Path(f"/proc/{pid}/task") / task / "comm").read_text() for task in os.listdir(f"/proc/{pid}/task")}
        assert not [name for name in names if "TP_" in name or "tensorpipe" in name.lower()]
