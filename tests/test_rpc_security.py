"""RPC, the transport of pools on several machines, here on one: its unpickler lets through text and tensors only."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import torch
from fault_service import Echo, Reduce
from harness import private_pool, worker_pids

from comfy_xdit.pool import rpc

LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp (include/net/tcp_states.h of Linux)."""


class Evil:
    """Runs `function` where it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def pool():
    with private_pool(transport="rpc") as pool:
        pool.call(Echo(value=1))
        yield pool


@pytest.fixture
def trap(tmp_path):
    return tmp_path / "pwned"


def attacks(trap):
    command = f"touch {trap}"
    return {
        "os.system": Evil(os.system, command),
        "eval": Evil(eval, f"__import__('os').system('{command}')"),
        "getattr to an allowed class": Evil(getattr, _receiver(), "__init__"),
        "getattr to another classmethod": Evil(getattr, _receiver(), "_script_module_receiver"),
        "torch.load": Evil(torch.load, str(trap)),
        "open": Evil(open, str(trap), "w"),
        "partial": Evil(partial, os.system, command),
        "harmless class": OrderedDict(a=1),
        "nested": {"a": [("b", Evil(os.system, command))]},
    }


def _receiver():
    from torch.distributed.rpc import internal

    return internal._InternalRPCPickler


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_are_refused(trap, name):
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        rpc.loads_safely(pickle.dumps(attacks(trap)[name]))
    assert not trap.exists()


def test_a_persistent_id_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        rpc.loads_safely(b"Pevil\n.")


def test_the_remote_function_becomes_the_workers_handler():
    def handler(serial, text, tensors):
        return text, tensors

    assert rpc.loads_safely(pickle.dumps(rpc.serve), handler) is handler
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        rpc.loads_safely(pickle.dumps(rpc.serve))


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_survives_hostile_arguments(pool, trap, name):
    from torch.distributed import rpc as torch_rpc

    pids = worker_pids(pool)
    with pool.lease():
        generation = pool.generation
        worker = pool._group.member.name(1)
        with pytest.raises(RuntimeError, match="refused"):
            torch_rpc.rpc_sync(worker, rpc.serve, args=(1, attacks(trap)[name], []), timeout=20)
        assert pool.call(Echo(value="still here")).value == "still here"
        assert pool.generation == generation
    assert not trap.exists()
    assert worker_pids(pool) == pids


@pytest.mark.parametrize("function", [os.system, os.getpid, rpc.loads_safely, rpc.RpcGroup.join], ids=str)
def test_a_worker_runs_no_other_function(pool, trap, function):
    from torch.distributed import rpc as torch_rpc

    with pool.lease():
        with pytest.raises(RuntimeError, match="refused"):
            torch_rpc.rpc_sync(pool._group.member.name(1), function, args=(f"touch {trap}",), timeout=20)
        assert pool.call(Echo(value=1)).value == 1
    assert not trap.exists()


@pytest.mark.parametrize("arguments", [("1", "{}", []), (1, None, []), (1, "{}", None), (True, "{}", [])])
def test_arguments_of_other_types_are_refused(pool, arguments):
    with pool.lease():
        [future] = pool._group.send([0], *arguments)
        with pytest.raises(ConnectionError, match="wrong argument types"):
            future.result(20)
        assert pool.call(Echo(value=1)).value == 1


def test_nothing_listens_beyond_loopback(pool):
    pool.call(Reduce(value=1.0))
    found = pool.status()
    pids = [found["pid"], os.getpid(), *(rank["pid"] for rank in found["ranks"])]
    inodes = {inode for pid in pids for inode in _socket_inodes(pid)}
    assert inodes
    listening = [address for address, inode in _listening() if inode in inodes]
    # Gloo listens between the ranks, so an empty list would mean that this test looked in the wrong place.
    assert listening
    assert all(_is_loopback(address) for address in listening), listening


def _socket_inodes(pid):
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _listening():
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN:
                yield local.rpartition(":")[0], rest[5]


def _is_loopback(address):
    mapped = "0000000000000000FFFF0000"
    # /proc prints each 32-bit word in the machine's byte order.
    v4 = address.removeprefix(mapped)
    return (len(v4) == 8 and v4.endswith("7F")) or address == "00000000000000000000000001000000"


