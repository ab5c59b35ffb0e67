"""What reaches a pool on one machine: text and tensors of its own user, at its door and nowhere else."""

from __future__ import annotations

import contextlib
import json
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
    with pool.turn():
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
def test_the_door_drops_who_talks_nonsense(pool, line):
    wire = Wire.connect(pool_folder(pool.name).door)
    try:
        with contextlib.suppress(OSError):
            wire.sock.sendall(line)
        wait_until(lambda: _is_closed(wire), "the door to hang up")
    finally:
        wire.close()
    assert pool.call(Echo(value=1)).value == 1


def _is_closed(wire):
    try:
        return wire.wait(0.1) and False
    except ConnectionError:
        return True


def test_a_line_in_pieces_is_read_whole(pool):
    wire = Wire.connect(pool_folder(pool.name).door)
    try:
        for byte in json.dumps({"type": "status"}).encode() + b"\n":
            wire.sock.sendall(bytes([byte]))
        assert wait_until(lambda: wire.wait(0.1), "the status")[0]["name"] == pool.name
    finally:
        wire.close()


def test_the_folder_is_private(pool):
    folder = pool_folder(pool.name)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.door.stat().st_mode & 0o777 == 0o600


def test_no_object_of_ours_is_pickled():
    text, tensors = encode(Echo(value={"x": torch.nn.Parameter(torch.ones(2))}))
    assert isinstance(text, str) and [type(tensor) for tensor in tensors] == [torch.Tensor]
