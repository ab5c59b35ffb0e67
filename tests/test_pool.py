"""A pool's life: start, status, stop, leases, clients that come, wait and go."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import torch
from fault_service import Echo, Journal, Keep, Reduce, Sleep
from harness import (
    NAME,
    OPTIONS,
    client_process,
    private_home,
    private_pool,
    says,
    stop_process,
    wait_until,
    wait_until_gone,
    worker_pids,
)

from comfy_xdit import cli
from comfy_xdit.pool import rpc as rpc_module
from comfy_xdit.pool import start as start_module
from comfy_xdit.pool.client import Pool, PoolError
from comfy_xdit.pool.network import Network


class Cancelled(Exception):
    """What a client's `poll` raises to interrupt."""


def models_of(pool):
    """What each rank said in its last beat; None before its first."""
    return [rank.get("models") for rank in pool.status()["ranks"]]


@pytest.fixture(scope="module")
def pool():
    with private_pool() as pool:
        yield pool


def test_a_call_reaches_every_rank_and_tensors_come_back_equal(pool):
    latent = torch.randn(1, 16, 5, 7, dtype=torch.bfloat16)
    results = pool.call_all(Echo(value={"x": [latent, None, 1.5, "text"]}))
    assert len(results) == pool.num_ranks == 2
    for result in results:
        assert torch.equal(result.value["x"][0], latent)
        assert result.value["x"][1:] == [None, 1.5, "text"]


def test_collectives_run_between_the_ranks(pool):
    assert pool.call(Reduce(value=1.5, rounds=3)).value == 3.0


def test_a_lease_can_be_nested_and_keeps_its_generation(pool):
    with pool.lease():
        before = pool.generation
        with pool.lease():
            pool.call(Echo(value=1))
        assert pool.call(Echo(value=2)).value == 2
        assert pool.generation == before
    assert pool.call(Echo(value=3)).value == 3
    assert pool.generation == before


def test_what_a_lease_holds_is_forgotten_at_its_end(pool):
    with pool.lease():
        num_before = pool.call(Journal()).value.count("forgot")
    with pool.lease():
        assert pool.call(Journal()).value.count("forgot") == num_before + 1


def test_threads_take_turns(pool):
    answers = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append((i, pool.call(Echo(value=i)).value)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(i, i) for i in range(4)]


def test_an_interrupt_drops_the_answer_and_the_next_call_gets_its_own(pool):
    polls = []

    def poll():
        polls.append(1)
        if len(polls) > 3:
            raise Cancelled

    pids, generation = worker_pids(pool), pool.generation
    with pool.lease():
        with pytest.raises(Cancelled):
            pool.call(Sleep(seconds=0.6), poll=poll)
        assert pool.call(Echo(value="mine")).value == "mine"
        assert pool.call(Reduce(value=1.0)).value == 2.0
    assert worker_pids(pool) == pids
    assert pool.generation == generation


def test_a_second_pool_object_in_this_process_takes_over_and_gives_back(pool):
    other = Pool.connect(NAME, "auto", start=False)
    try:
        for round_ in range(2):
            assert pool.call(Echo(value=round_)).value == round_
            assert other.call(Echo(value=-round_)).value == -round_
    finally:
        other.close()
    assert pool.call(Reduce(value=1.0)).value == 2.0


def anonymous_bytes(pid):
    """Of RAM, in the kernel's own count: memory of a message is shared, and not among it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such line")


def test_many_jobs_and_groups_leave_no_memory_behind(pool):
    value, other = torch.ones(40_000), Pool.connect(NAME, "auto", start=False)

    def work():
        with pool.lease():
            for _ in range(500):
                pool.call(Echo(value=value))
        for _ in range(20):
            other.call(Echo(value=1))
            pool.call(Echo(value=1))

    try:
        work()
        pids = [os.getpid(), *worker_pids(pool)]
        before = [anonymous_bytes(pid) for pid in pids]
        work()
    finally:
        other.close()
    # A kilobyte a job would be 500 kB.
    assert all(anonymous_bytes(pid) - was < 450_000 for pid, was in zip(pids, before, strict=True))


def test_a_second_client_queues_and_then_gets_its_lease(pool):
    with client_process("slow") as other:
        with pool.lease():
            pool.call(Echo(value=1))
            says(other, "connected")
            queue = wait_until(lambda: pool.status()["queue"], "the other client in the queue")
            assert [entry["pid"] for entry in queue] == [other.pid]
            assert pool.call(Echo(value=2)).value == 2
        says(other, "lease")
        pids = worker_pids(pool)
        # We are the ones who queue now.
        assert pool.call(Echo(value=3)).value == 3
        says(other, "done")
    assert worker_pids(pool) == pids


def test_a_cancelled_wait_leaves_the_queue(pool):
    def poll():
        if pool.status()["queue"]:
            raise Cancelled

    with client_process("sleep") as other:
        says(other, "connected")
        says(other, "lease")
        with pytest.raises(Cancelled):
            pool.call(Echo(value=1), poll=poll)
        wait_until(lambda: not pool.status()["queue"], "an empty queue")


def test_a_killed_client_loses_its_job_and_the_pool_takes_the_next(pool):
    pool.call(Keep(name="warm"))
    pids = worker_pids(pool)
    with client_process("slow") as other:
        says(other, "connected")
        says(other, "lease")
        other.kill()
        assert pool.call(Reduce(value=1.0)).value == 2.0
    assert worker_pids(pool) == pids
    wait_until(lambda: models_of(pool) == [["warm"], ["warm"]], "a beat that tells what is held")
    assert pool.call(Journal()).value[-3:] == ["Reduce", "forgot", "Journal"]
    pool.call(Keep(name=""))


def test_status_tells_what_a_user_wants_to_know(pool):
    pool.call(Keep(name="flux"))
    wait_until(lambda: all(r.get("models") == ["flux"] for r in pool.status()["ranks"]), "a beat of each rank")
    found = pool.status()
    assert found["state"] in ("ready", "busy")
    assert found["devices"] == ["cpu", "cpu"]
    assert Path(found["log"]).is_file()
    assert found["uptime_s"] > 0 and found["generation"] == pool.generation
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["ram_bytes"] > rank["ram_private_bytes"] > 0 for rank in found["ranks"])
    pool.call(Keep(name=""))


def test_commands_start_show_and_stop(capsys):
    with private_home():
        name = ["--name", NAME]
        service = ["--service", OPTIONS["service"], "--path", OPTIONS["path"][0]]
        assert cli.main(["pool", "status", *name]) == 1
        assert "comfy-xdit pool start" in capsys.readouterr().err
        assert cli.main(["pool", "start", "--devices", "cpu:2", *name, *service]) == 0
        assert "2 workers on cpu:2" in capsys.readouterr().out
        assert cli.main(["pool", "status", "--json", *name]) == 0
        found = json.loads(capsys.readouterr().out)
        pids = [found["pid"], *(rank["pid"] for rank in found["ranks"])]
        assert found["state"] == "ready" and len(set(pids)) == 3
        assert cli.main(["pool", "status", *name]) == 0
        shown = capsys.readouterr().out
        assert all(str(rank["pid"]) in shown for rank in found["ranks"]) and found["log"] in shown
        assert cli.main(["pool", "stop", *name]) == 0
        wait_until_gone(pids)
        capsys.readouterr()
        assert cli.main(["pool", "stop", *name]) == 0
        assert "no pool" in capsys.readouterr().out


def test_unknown_commands_are_listed(capsys):
    assert cli.main(["pool", "dance"]) == 2
    told = capsys.readouterr().err
    assert "pool start" in told and "pool stop" in told


def test_two_clients_that_start_at_once_share_one_pool_that_outlives_them():
    with private_home(), client_process("keep") as first, client_process("keep") as second:
        assert says(first, "connected") == says(second, "connected")
        first.wait(60)
        second.wait(60)
        with_them = Pool.connect(NAME, "auto", start=False)
        try:
            assert with_them.call(Journal()).value.count("Keep") == 2
            wait_until(lambda: models_of(with_them) == [["kept"], ["kept"]], "a beat that tells what is held")
        finally:
            with_them.close()


def test_a_killed_supervisor_leaves_no_worker_and_the_same_object_starts_anew():
    with private_pool() as pool:
        pool.call(Echo(value=1))
        found = pool.status()
        workers = worker_pids(pool)
        generation = pool.generation
        os.kill(found["pid"], signal.SIGKILL)
        wait_until_gone([found["pid"], *workers])
        # The folder is as the dead left it: coordinator, stores and lock files.
        assert Path(found["log"]).with_name("socket").exists()
        assert pool.call(Reduce(value=1.0)).value == 2.0
        assert pool.status()["pid"] != found["pid"]
        assert pool.generation > generation


def test_a_supervisor_killed_in_a_job_fails_it_in_one_sentence():
    with private_pool() as pool, pool.lease():
        pool.call(Echo(value=1))
        supervisor = pool.status()["pid"]
        threading.Timer(0.3, os.kill, (supervisor, signal.SIGKILL)).start()
        with pytest.raises(PoolError, match="supervisor of pool 'test' ended") as told:
            pool.call(Sleep(seconds=600))
        assert told.value.kind == "lost"
        assert pool.call(Echo(value=2)).value == 2


def test_a_supervisor_that_hangs_can_be_stopped(capsys):
    with private_pool() as pool:
        pool.call(Echo(value=1))
        pids = [pool.status()["pid"], *worker_pids(pool)]
        stop_process(pids[0])
        assert cli.main(["pool", "stop", "--name", NAME]) == 0
        wait_until_gone(pids)
        assert capsys.readouterr().out == f"pool {NAME!r} and its workers ended\n"


def test_a_pool_on_several_machines_is_not_replaced_by_one_here():
    was = Network(num_machines=3, interface="lo", address="127.0.0.1", port=29500)
    with private_home() as home, pytest.raises(PoolError, match=r"on 3 machines has ended.*--name test --nodes 3`"):
        start_module.reach(NAME, "cpu:1", start=True, was=was)
    assert not home.exists()


def test_a_process_in_an_rpc_group_of_its_own_is_told_so_where_rpc_is_used(pool, monkeypatch):
    monkeypatch.setattr(rpc_module, "_current_name", lambda: "trainer0")
    assert pool.call(Echo(value=2)).value == 2
    with pytest.raises(PoolError, match="already takes part in torch RPC as 'trainer0'"):
        rpc_module.RpcJoiner().check("lo")


def test_a_pool_with_another_transport_is_refused(pool, capsys):
    with pytest.raises(PoolError, match=r"runs with --transport sockets, not rpc; stop it with `comfy-xdit pool stop"):
        Pool.connect(NAME, "auto", transport="rpc")
    words = ["--name", NAME, "--nodes", "2", "--interface", "lo", "--transport", "sockets"]
    assert cli.main(["pool", "start", *words]) == 1
    assert "--transport sockets is for one machine, and --nodes 2 are several" in capsys.readouterr().err


def test_rpc_on_one_machine_is_started_with_its_risk_in_a_sentence(capsys):
    with private_home():
        words = ["--name", NAME, "--transport", "rpc", "--devices", "cpu:2"]
        assert cli.main(["pool", "start", *words, "--service", OPTIONS["service"], "--path", OPTIONS["path"][0]]) == 0
        said = capsys.readouterr().out
        assert "listens on 127.0.0.1 and knows no passwords, so every user of this machine can end ComfyUI" in said
        pool = Pool.connect(NAME)
        try:
            assert pool.call(Reduce(value=1.0)).value == 2.0
            with pool.lease():
                assert pool.call(Echo(value=1)).value == 1
        finally:
            pool.close()


def test_workers_that_cannot_start_are_told_with_the_reason():
    with private_pool(service="fault_service:BrokenService") as pool:
        with pytest.raises(PoolError, match=r"failed to start.*the driver is too old.*the log is"):
            pool.call(Echo(value=1))
        assert pool.status()["state"] == "failing"


def test_a_pool_on_other_devices_is_refused(pool):
    with pytest.raises(PoolError, match=r"runs on cpu:2, not on cpu:3; stop it with `comfy-xdit pool stop"):
        Pool.connect(NAME, "cpu:3")


def test_a_pool_of_another_version_is_refused(pool, monkeypatch):
    monkeypatch.setattr(start_module, "versions", lambda: {"comfy_xdit": "9.9.9", "torch": "2.13"})
    with pytest.raises(PoolError, match=r"another version.*9\.9\.9.*comfy-xdit pool stop --name test"):
        Pool.connect(NAME, "auto")
    assert pool.call(Echo(value=1)).value == 1


def test_no_pool_is_told_when_none_may_be_started():
    with private_home() as home, pytest.raises(PoolError, match="no pool 'test' runs; start it with"):
        Pool.connect(NAME, "cpu:2", start=False)
    assert not home.exists()


def test_a_pool_made_anew_counts_from_one_again_in_the_same_process():
    for _ in range(2):
        with private_pool() as pool:
            assert pool.call(Reduce(value=1.0)).value == 2.0
            assert pool.generation == 1
