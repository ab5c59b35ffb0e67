"""The coordinator for workers of other machines, with played ones; and a torchrun of two nodes on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from comfy_xdit_worker import join
from fault_service import Reduce
from harness import NAME, OPTIONS, private_home, wait_until, wait_until_gone, worker_pids
from played import Played, free_port, hears, played_coordinator

from comfy_xdit import cli
from comfy_xdit.pool import grants, membership, network, pace, rendezvous, rpc
from comfy_xdit.pool.client import Pool, PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.handshake import Challenge, kept_key, prove, read_key
from comfy_xdit.pool.judge import Cause
from comfy_xdit.pool.network import network_on
from comfy_xdit.pool.report import report
from comfy_xdit.pool.wire import Wire, versions

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60
KEY = b"k" * 32


@pytest.fixture
def coordinator(tmp_path, monkeypatch):
    """A coordinator for two machines with a device each, on loopback."""
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    with played_coordinator(2) as coordinator:
        yield coordinator


def test_nobody_is_welcomed_before_all_are_there(coordinator):
    one = Played(coordinator, 1)
    assert one.hears_nothing()
    zero = Played(coordinator, 0)
    welcomes = [zero.hears(), one.hears()]
    assert [welcome["rank"] for welcome in welcomes] == [0, 1]
    assert welcomes[0]["store"] == welcomes[1]["store"]
    assert [rank["machine"] for rank in report(coordinator)["ranks"]] == ["host-0", "host-1"]


def test_a_worker_that_waits_outlives_the_others(coordinator):
    gone, stays = Played(coordinator, 0), Played(coordinator, 1)
    # Both are there, so an attempt began; its end is the end of both.
    assert gone.hears()["type"] == stays.hears()["type"] == "welcome"
    gone.wire.close()
    assert stays.hears() is None
    stays = Played(coordinator, 1)
    for _ in range(2):
        passing = Played(coordinator, 0, versions={})
        assert passing.hears()["type"] == "refused"
    assert stays.hears_nothing(), "it is not sent away"
    assert coordinator.num_restarts == 1


@pytest.mark.parametrize(("cause", "kept"), [("memory", ["b"]), ("fault", ["a", "b"])])
def test_new_workers_load_again_what_is_in_use_and_first_what_loads_need(coordinator, cause, kept):
    workers = [Played(coordinator, number) for number in range(2)]
    assert [worker.hears()["residents"] for worker in workers] == [[], []]
    workers[0].say("residents", setup=["first"], messages=["a", "b"])
    wait_until(lambda: coordinator.residents == ["a", "b"], "the report")
    coordinator._lose("lost", cause=Cause(generation=1, serial=1, failure={"kind": cause}))
    assert all(worker.hears() is None for worker in workers)
    again = [Played(coordinator, number) for number in range(2)]
    assert [worker.hears()["residents"] for worker in again] == [["first", *kept]] * 2


def test_no_two_attempts_share_a_store(coordinator):
    old = [Played(coordinator, 0), Played(coordinator, 1)]
    stores = [worker.hears()["store"] for worker in old]
    # Machine 1 loses its worker, and has a new one at the coordinator before machine 0 hears of it.
    old[1].wire.close()
    new = [Played(coordinator, 1)]
    assert old[0].hears() is None
    new.append(Played(coordinator, 0))
    stores += [worker.hears()["store"] for worker in new]
    assert stores[0] == stores[1] != stores[2] == stores[3]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"versions": {"torch": "1.0"}}, r"host-1 has torch 1\.0, and the pool comfy-xdit \S+, torch \S+; install"),
        ({"machine": 2}, "--node-rank 2 is none of this pool's 2 machines; use 0 to 1"),
        ({"machine": -1}, "--node-rank -1 is none of this pool's 2 machines"),
        ({"num_local": 4}, "starts 4 processes on host-1, and the pool has 1 devices .* use --nproc-per-node 1"),
    ],
)
def test_who_does_not_fit_is_told_why(coordinator, changes, sentence):
    answer = Played(coordinator, 1, **changes)
    told = answer.hears()
    assert told["type"] == "refused" and not told["again"]
    assert re.search(sentence, told["reason"])
    assert answer.hears() is None


def test_a_second_machine_of_the_same_number_is_told_of_the_first(coordinator):
    first, second = Played(coordinator, 1), Played(coordinator, 1, host="double", pid=7)
    told = second.hears()
    assert told["type"] == "refused" and told["again"], "the first may be a dead one"
    assert "rank 1 of this pool is process 1001 on host-1; give each machine a --node-rank" in told["reason"]
    assert first.hears_nothing()


@pytest.mark.parametrize(
    "line",
    [
        b'{"type": "stop"}\n',
        b'{"type": "status"}\n',
        b'{"type": "client"}\n',
        b'{"type": "worker", "rank": 0, "attempt": 99}\n',
        b'{"type": "worker", "machine": "x", "local_rank": 0, "pid": 1, "host": "h"}\n',
        b"not json\n",
    ],
)
@pytest.mark.parametrize("proves", [True, False])
def test_over_the_network_nothing_is_taken_but_a_greeting(coordinator, line, proves):
    wire = Wire.connect((coordinator.network.address, coordinator.network.port))
    if proves:
        prove(wire, read_key(coordinator.folder.key))
    else:
        assert hears(wire)["type"] == "challenge"
    wire.sock.sendall(line)
    # Nothing, or that it must prove itself.
    assert (said := hears(wire)) is None or (not proves and said["type"] == "refused" and hears(wire) is None)
    assert not coordinator._stopping and report(coordinator)["state"] == "starting"


def test_a_client_is_told_which_machine_is_missing(coordinator, monkeypatch):
    monkeypatch.setattr(grants, "ABSENT_LIMIT_S", 0.3)
    workers = [Played(coordinator, 0), Played(coordinator, 1)]
    assert all(worker.hears()["type"] == "welcome" for worker in workers)
    workers[1].wire.close()
    assert workers[0].hears() is None
    again = Played(coordinator, 0)
    pool = Pool.connect("test", "auto", start=False)
    sentence = r"waits at 127.0.0.1:\d+ for rank 1 \(machine 1, last seen as host-1\); `comfy-xdit pool start"
    with pytest.raises(PoolError, match=sentence):
        pool.call(Reduce(value=1.0))
    pool.close()
    again.wire.close()


def test_machines_that_cannot_reach_each_other_are_told_so(coordinator, monkeypatch):
    monkeypatch.setattr(membership, "MEET_TIMEOUT_S", 0.3)
    workers = [Played(coordinator, 0), Played(coordinator, 1)]
    assert all(worker.hears()["type"] == "welcome" for worker in workers)
    workers[0].say("met")
    assert [worker.hears() for worker in workers] == [None, None]
    assert "did not reach each other over lo" in report(coordinator)["last_error"]
    assert "firewalls" in report(coordinator)["last_error"]


def test_a_silent_one_makes_room(coordinator, monkeypatch):
    monkeypatch.setattr(rendezvous, "HEARTBEAT_TIMEOUT_S", 0.6)
    silent = Played(coordinator, 1)
    wait_until(lambda: coordinator.has_workers, "the silent one")
    assert silent.hears() is None
    beating = Played(coordinator, 1)
    for _ in range(8):
        beating.say("beat")
        assert beating.wire.wait(0.1) == []
    assert coordinator.has_workers


def test_after_failing_starts_there_is_a_pause(coordinator, monkeypatch):
    for _ in range(2):
        coordinator.pace.began()
    assert coordinator.pace.pause_s == 2.0
    monkeypatch.setattr(pace, "LONGEST_PAUSE_S", 1.0)
    workers = [Played(coordinator, 0), Played(coordinator, 1)]
    assert all(worker.hears()["type"] == "welcome" for worker in workers)
    assert coordinator.pace.pause_s == 1.0, "that they are up shows nothing yet"
    workers[0].say("done", generation=1, serial=1, failure=None)
    wait_until(lambda: coordinator.pace.pause_s == 0.0, "a message that was ended")


def test_at_the_end_all_are_told_to_end_also_those_that_come_late(coordinator):
    waits = Played(coordinator, 0)
    wait_until(lambda: coordinator.has_workers, "the one that waits")
    coordinator.dismiss()
    assert waits.hears() == Played(coordinator, 1).hears() == {"type": "end"}


# The command `pool join`


def joined(*arguments, **environment):
    command = [sys.executable, "-m", "comfy_xdit", "pool", "join", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT_S
    )


def test_join_without_torchrun_is_told():
    done = joined("127.0.0.1:1")
    assert done.returncode == 1 and "`pool join` is for torchrun; use the command that" in done.stderr


@pytest.mark.parametrize("place", ["nowhere", "host:", ":1", "host:99999"])
def test_join_gives_up_so_that_torchrun_ends_too(place):
    done = joined(place, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="0")
    assert done.returncode == 0, "torchrun would start it again and again"
    assert done.stderr == f"comfy-xdit: {place!r} is no HOST:PORT; use what `comfy-xdit pool start --nodes` printed\n"


def test_join_looks_for_a_coordinator_for_a_while(monkeypatch):
    monkeypatch.setattr(join, "COORDINATOR_WAIT_S", 0.1)
    with pytest.raises(PoolError, match=r"no pool is at 127.0.0.1:\d+ \(Connection refused\); start it with"):
        join._come_in(("127.0.0.1", free_port()), KEY, {}, None)


def test_join_looks_anew_for_a_coordinator_that_let_it_wait(monkeypatch):
    """However long it waited: a coordinator that was killed may be opened again."""
    monkeypatch.setattr(join, "COORDINATOR_WAIT_S", 0.5)
    monkeypatch.setattr(join, "TRY_EVERY_S", 0.1)
    monkeypatch.setattr(join, "BEAT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = []

        def serve():
            for wait_s, said in ((1.0, b""), (0.0, b'{"type": "welcome"}\n')):
                connection, _ = server.accept()
                accepted.append(connection)
                wire, challenge = Wire(connection), Challenge(KEY, "{}:{}".format(*connection.getsockname()))
                wire.send(challenge.question)
                wire.send(challenge.answer(wait_until(lambda wire=wire: wire.wait(0.1), "a proof")[0]))
                time.sleep(wait_s)
                if said:
                    connection.sendall(said)
                else:
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        wire, interface, welcome = join._come_in(server.getsockname(), KEY, {"type": "worker"}, None)
        thread.join()
        wire.close()
    assert (interface, welcome, len(accepted)) == ("lo", {"type": "welcome"}, 2)
    for connection in accepted:
        connection.close()


def test_join_asks_again_where_its_place_is_taken(coordinator, monkeypatch):
    monkeypatch.setattr(join, "COORDINATOR_WAIT_S", 1.5)
    first = Played(coordinator, 1)
    greeting = {"type": "worker", "machine": 1, "local_rank": 0, "num_local": 1, "host": "h", "pid": 1}
    with pytest.raises(PoolError, match="rank 1 of this pool is process 1001 on host-1"):
        join._come_in(
            (coordinator.network.address, coordinator.network.port),
            read_key(coordinator.folder.key),
            greeting | {"versions": versions()},
            None,
        )
    assert first.hears_nothing()


@pytest.mark.parametrize("words", [["--interface", "lo"], ["--port", "29500"]])
def test_what_is_for_several_machines_says_that_nodes_are_missing(words, capsys):
    assert cli.main(["pool", "start", *words]) == 1
    said = f"comfy-xdit: {' '.join(words)} is for a pool on several machines; add --nodes and how many they are, or"
    assert capsys.readouterr().err.startswith(said)


def test_an_interface_that_is_not_there_is_told(coordinator):
    with pytest.raises(PoolError, match=r"eth77 is no interface .* with --interface: it has .*lo \(127.0.0.1\)"):
        join._come_in((coordinator.network.address, coordinator.network.port), KEY, {}, "eth77")
    with pytest.raises(PoolError, match=r"--interface 'eth77' is no interface .* this machine has .*lo \(127.0.0.1\)"):
        network_on("eth77", num_machines=2)
    for options, sentence in (({"num_machines": 65}, "--nodes 65"), ({"num_machines": 2, "port": 0}, "--port 0")):
        with pytest.raises(PoolError, match=sentence):
            network_on("lo", **options)
    assert network_on("lo", num_machines=2).address == "127.0.0.1" and network.interface_of("127.0.0.1") == "lo"


def test_a_process_listens_on_one_interface_in_its_life(monkeypatch):
    monkeypatch.setattr(rpc, "_listens_on", "lo")
    with pytest.raises(PoolError, match=r"has been in a pool over lo, .* so it can't use one over eth0; start it anew"):
        rpc.require_interface("eth0")
    monkeypatch.setattr(rpc, "_listens_on", "eth0")
    rpc.require_interface("lo")


def test_a_port_that_is_taken_is_told():
    with private_home(), socket.create_server(("127.0.0.1", 0)) as taken:
        where = network_on("lo", num_machines=2, port=taken.getsockname()[1])
        with pytest.raises(PoolError, match=r"cannot listen at 127.0.0.1:\d+ \(Address already in use\); give another"):
            Pool.connect(NAME, "cpu:1", network=where)


# A torchrun of two nodes, all on this machine


@contextlib.contextmanager
def torchruns(where):
    """`torchrun --nnodes 2`, as two machines would run it."""
    rendezvous = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    rest = ["--nproc-per-node", "1", "--max-restarts", "100", "-m", "comfy_xdit", "pool", "join", where.coordinator]
    key = pool_folder(NAME).key
    kept_key(key)
    service = ["--key-file", str(key), "--service", OPTIONS["service"], "--path", OPTIONS["path"][0]]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    started = [
        subprocess.Popen([*torchrun, *rendezvous, "--node-rank", str(rank), *rest, *service], cwd=ROOT)
        for rank in range(2)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
            process.wait(LIMIT_S)


def test_torchrun_of_two_nodes_heals_and_ends_with_the_pool():
    where = network_on("lo", num_machines=2, port=free_port())
    with private_home(), torchruns(where) as started:
        pool = Pool.connect(NAME, "cpu:1", network=where, **OPTIONS)
        assert pool.devices == ["cpu", "cpu"] and pool.num_ranks == 2
        assert pool.call(Reduce(value=1.0)).value == 2.0
        pids = worker_pids(pool)
        os.kill(pids[1], signal.SIGKILL)
        wait_until_gone(pids)
        assert pool.call(Reduce(value=1.0)).value == 2.0
        assert not set(worker_pids(pool)) & set(pids)
        # A killed supervisor takes the workers with it; their torchruns find the next one.
        pids = worker_pids(pool)
        os.kill(pool.status()["pid"], signal.SIGKILL)
        wait_until_gone(pids)
        assert pool.call(Reduce(value=1.0)).value == 2.0
        with pytest.raises(PoolError, match=r"runs on cpu:1 of each of 2 machines at .* \(lo\), not on cpu:2; stop it"):
            Pool.connect(NAME, "cpu:2")
        pids = worker_pids(pool)
        pool.close()
        command = [sys.executable, "-m", "comfy_xdit", "pool", "stop", "--name", NAME]
        subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT_S)
        wait_until_gone(pids)
        assert [process.wait(LIMIT_S) for process in started] == [0, 0]


# Workers end with their torchrun

CHILD = """
import os, runpy, sys, time
runpy.run_path({mount!r})["mount"]("comfy_xdit", "comfy_xdit_worker")
from comfy_xdit_worker.rank import _die_with_parent
if os.fork():
    {parent}
else:
    time.sleep({late_s})
    _die_with_parent()
    print("alive")
"""


@pytest.mark.parametrize("is_first", [True, False], ids=["torchrun is the first process", "an orphan"])
def test_a_workers_parent_may_be_the_first_process_of_a_container(is_first):
    separate = ["unshare", "--fork", "--pid", "--mount-proc"]
    if os.geteuid() or subprocess.run([*separate, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces can't be made here")
    parent, late_s = ("os.wait()", 0) if is_first else ("os._exit(0)", 0.5)
    mount = str(ROOT / "comfy_xdit" / "mount.py")
    child = [sys.executable, "-c", CHILD.format(mount=mount, parent=parent, late_s=late_s)]
    # Whose parent ended is a child of the first process, here a shell.
    command = child if is_first else ["sh", "-c", '"$@"; sleep 2', "sh", *child]
    done = subprocess.run([*separate, *command], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == ("alive\n" if is_first else ""), done.stderr
