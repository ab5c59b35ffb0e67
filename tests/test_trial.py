"""The first exchange between the ranks: what is wrong with it costs a start and is told with the pair of ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import torch
from comfy_xdit_worker import trial as worker_trial
from events import Launch, Meet, Wait
from fault_service import Reduce
from harness import NAME, OPTIONS, private_home, private_pool, wait_until, wait_until_gone, worker_pids
from nccl_sim import differences, stuck
from played import Played, played_coordinator
from pretend_cuda import pretending

from comfy_xdit import cli
from comfy_xdit.pool import trial
from comfy_xdit.pool.client import Pool, PoolError, status
from comfy_xdit.pool.fields import Malformed
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.report import report
from comfy_xdit.pool.trial import ALL_REDUCE, ALL_TO_ALL, SEND_RECEIVE, Step, failed, overdue, step_of

PLANTED = Path(__file__).resolve().parent / "faults" / "planted"
DEVICES = ["cuda:0", "cuda:1", "cuda:2"]


@pytest.fixture
def plant(monkeypatch):
    """Plants a fault in the workers of pools that are started from now on."""

    def planted(rank, kind):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PLANTED), os.environ.get("PYTHONPATH")])))
        monkeypatch.setenv("PLANTED", f"{rank} {kind}")

    return planted


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("wrong", r"worker 1 \(cpu\) and worker 0 \(cpu\) can't exchange data over gloo: send and receive gave wrong"),
        ("raises", r"can't exchange data over gloo: send and receive raised RuntimeError: "),
    ],
)
def test_a_pool_whose_ranks_cannot_exchange_data_says_which_and_does_not_try_for_ever(plant, capsys, kind, sentence):
    plant(1, kind)
    with private_home():
        # The client is told, and `pool start`.
        pool = Pool.connect(NAME, "cpu:2", **OPTIONS)
        with pytest.raises(PoolError, match=rf"pool 'test' can't work: .*{sentence}.*usual causes: .*; see docs/"):
            pool.call(Reduce(value=1.0))
        assert status(NAME)["state"] == "failing"
        num_restarts = status(NAME)["num_restarts"]
        assert cli.main(["pool", "start", "--name", NAME]) == 1
        assert "can't exchange data over gloo" in capsys.readouterr().err
        # Nothing is started until somebody asks: then it is tried again, and told again.
        wait_until(lambda: all(rank["pid"] is None for rank in status(NAME)["ranks"]), "the end of the workers")
        assert status(NAME)["num_restarts"] == num_restarts
        with pytest.raises(PoolError, match="pool 'test' can't work: "):
            pool.call(Reduce(value=1.0))
        assert status(NAME)["num_restarts"] > num_restarts
        pool.close()
        pids = [status(NAME)["pid"]]
        assert cli.main(["pool", "stop", "--name", NAME]) == 0
        wait_until_gone(pids)


def test_a_pool_works_once_the_cause_is_gone(plant, monkeypatch):
    plant(0, "wrong")
    with private_home():
        pool = Pool.connect(NAME, "cpu:2", **OPTIONS)
        with pytest.raises(PoolError, match="can't work"):
            pool.call(Reduce(value=1.0))
        pool.close()
        assert cli.main(["pool", "stop", "--name", NAME]) == 0
        monkeypatch.delenv("PLANTED")
        assert pool.call(Reduce(value=1.0)).value == 2.0
        assert "can't" not in pool_folder(NAME).log.read_text() and worker_pids(pool)
        pool.close()


def test_three_ranks_that_reach_each_other_are_up():
    with private_pool("cpu:3") as pool:
        assert pool.call(Reduce(value=1.0)).value == 3.0
        assert not status(NAME)["last_error"]


# The coordinator's judgement, of played workers


@pytest.fixture
def coordinator(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    with played_coordinator(3, num_devices=3) as coordinator:
        yield coordinator


def beats(workers):
    return [worker.say("beat", status={}) for worker in workers]


def meet(coordinator):
    workers = [Played(coordinator, number) for number in range(3)]
    for worker in workers:
        assert worker.hears()["type"] == "welcome"
        worker.say("met")
    return workers


def trying(number, *peers, step=SEND_RECEIVE):
    return {"number": number, "step": step, "backend": "NCCL", "peers": list(peers)}


def test_a_rank_that_hangs_in_it_is_judged_by_time(coordinator, monkeypatch):
    monkeypatch.setattr(trial, "LIMIT_S", 0.5)
    workers = meet(coordinator)
    workers[0].say("trying", **trying(2, 1, 2))
    workers[1].say("trying", **trying(1, 0, 2))
    workers[2].say("trying", **trying(1, 1, 0))
    # Beats go on: only the main thread hangs.
    wait_until(lambda: beats(workers) and coordinator.starts.held, "the judgement")
    assert all(worker.hears() is None for worker in workers)
    held = coordinator.starts.held
    assert held.startswith("worker 1 (cpu) and worker 2 (cpu) can't exchange data over NCCL: send and rec")
    assert report(coordinator)["state"] == "failing" and "NCCL_P2P_DISABLE=1" in report(coordinator)["last_error"]
    # Those that torchrun starts again wait, until a client asks.
    again = [Played(coordinator, number) for number in range(3)]
    assert all(worker.hears_nothing() for worker in again)
    pool = Pool.connect("test", "auto", start=False)
    try:
        pool._wire.send({"type": "lease", "generation": 0})
        assert all(worker.hears()["type"] == "welcome" for worker in again)
    finally:
        pool.close()


def test_ranks_that_tried_are_not_judged_by_it(coordinator, monkeypatch):
    monkeypatch.setattr(trial, "LIMIT_S", 0.3)
    workers = meet(coordinator)
    for worker in workers:
        worker.say("tried")
    assert all(worker.hears_nothing() for worker in workers) and not coordinator.starts.held


def test_one_that_raised_is_tried_again_and_wrong_numbers_are_not(coordinator):
    workers = meet(coordinator)
    workers[0].say("trial_failed", **trying(1, 2, 1), raised="RuntimeError: connection closed by peer")
    assert all(worker.hears() is None for worker in workers) and not coordinator.starts.held
    workers = meet(coordinator)
    workers[0].say("trial_failed", **trying(1, 2, 1), raised="RuntimeError: connection closed by peer")
    assert all(worker.hears() is None for worker in workers)
    held = coordinator.starts.held
    assert "worker 2 (cpu) and worker 0 (cpu) can't exchange data over NCCL: send and receive raise" in held
    coordinator._release()
    workers = meet(coordinator)
    workers[1].say("trial_failed", **trying(3, 2, step=ALL_TO_ALL), raised="")
    assert all(worker.hears() is None for worker in workers)
    held = coordinator.starts.held
    assert "worker 2 (cpu) and worker 1 (cpu) can't exchange data over NCCL: all_to_all gave wrong" in held


# Its sentences


def step(number, *peers, name=SEND_RECEIVE, backend="NCCL"):
    return Step(number=number, step=name, backend=backend, peers=peers)


@pytest.mark.parametrize(
    ("steps", "who"),
    [
        # All wait, in a ring; one link of it is broken, so the others are a step ahead.
        ({0: step(1, 2, 1), 1: step(1, 0, 2), 2: step(2, 1, 0)}, "worker 0 (cuda:0) and worker 1 (cuda:1) can't"),
        ({2: step(1, 1, 0)}, "worker 1 (cuda:1) and worker 2 (cuda:2) can't"),
        ({0: None, 1: step(1, 0, 2), 2: step(1, 1, 0)}, "worker 0 (cuda:0) did not begin to exchange data within 60 s"),
        ({0: None, 1: None}, "worker 0 (cuda:0) and worker 1 (cuda:1) did not begin"),
        (
            {r: step(3, name=ALL_REDUCE) for r in range(3)},
            "worker 0 (cuda:0), worker 1 (cuda:1) and worker 2 (cuda:2) c",
        ),
    ],
)
def test_who_is_named(steps, who):
    assert overdue(steps, DEVICES).startswith(who)


def test_causes_are_those_of_the_library():
    nccl = failed(step(1, 0, 2), 1, "", DEVICES)
    for word in ("NCCL_P2P_DISABLE=1", "--shm-size", "IOMMU", "ACS", "docs/troubleshooting.md"):
        assert word in nccl
    assert "worker 0 (cuda:0) and worker 1 (cuda:1) can't exchange data over NCCL: send and receive gave wrong" in nccl
    assert "firewall" in failed(step(1, 0, 2, backend="gloo"), 1, "", DEVICES)


@pytest.mark.parametrize(
    "changes", [{"number": 0}, {"step": "x"}, {"backend": "mpi"}, {"peers": [3]}, {"peers": [True]}]
)
def test_a_step_of_no_sense_is_refused(changes):
    assert step_of(trying(1, 0, 2), 3) == step(1, 0, 2)
    with pytest.raises(Malformed):
        step_of(trying(1, 0, 2) | changes, 3)


# The exchange itself


class Told:
    def __init__(self):
        self.said = []

    def __call__(self, kind, **fields):
        self.said.append((kind, fields))


def test_a_lone_rank_has_nothing_to_try():
    told = Told()
    worker_trial.try_groups(torch.device("cpu"), 0, 1, told)
    assert told.said == [("tried", {})]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_it_leaves_no_connection_behind(num_ranks):
    """On a GPU each takes memory of the device for as long as its group lives."""
    records = []
    for rank in range(num_ranks):
        with pretending(rank, num_ranks) as device, mock.patch.object(torch, "equal", lambda a, b: a.shape == b.shape):
            worker_trial.try_groups(device.device, rank, num_ranks, Told())
            records.append(device.events)
    for record in records:
        last = max(place for place, event in enumerate(record) if isinstance(event, Launch))
        used = {event.group for event in record if isinstance(event, Launch)}
        after = [event for event in record[last:] if isinstance(event, Meet | Wait)]
        freed = {event.group for event in after if isinstance(event, Meet) and event.kind == "destroy_process_group"}
        assert used and used == freed
        # What is under way on the device would be cut off.
        assert any(isinstance(event, Wait) and event.for_all for event in after)
    assert not differences(records) and not stuck(records) and not stuck(records, lazy_loading=True)


def test_no_two_ranks_exchange_the_same_numbers():
    cpu = torch.device("cpu")
    seen = {tuple(worker_trial._numbers(cpu, a, b)[:4].tolist()) for a in range(8) for b in range(8)}
    assert len(seen) == 64
    sums = sum(worker_trial._numbers(cpu, rank, 0).max() for rank in range(64))
    assert sums < 2**24, "exact in fp32"


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_pair_is_tried_by_every_way(num_ranks):
    pairs = set()
    for rank in range(num_ranks):
        steps = list(worker_trial._steps(torch.device("cpu"), rank, num_ranks, None))
        assert [name for name, _, _ in steps[-2:]] == [ALL_REDUCE, ALL_TO_ALL]
        pairs |= {(peers[0], rank) for name, peers, _ in steps if name == SEND_RECEIVE}
    assert pairs == {(a, b) for a in range(num_ranks) for b in range(num_ranks) if a != b}
