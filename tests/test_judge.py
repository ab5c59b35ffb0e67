"""What the coordinator decides of failures, whatever order the ranks' reports come in."""

from __future__ import annotations

import pytest

from comfy_xdit.pool import judge as judges
from comfy_xdit.pool.judge import Judge, Keep, Restart
from comfy_xdit.pool.membership import Membership, WorkerLine


@pytest.fixture
def ranks():
    """A judge, and what rank `rank` says: it ended message `serial`, called `name`, with a failure or without."""
    membership = Membership(["cpu", "cpu"])
    membership.workers = {rank: WorkerLine(wire=None, rank=rank, pid=1, heard_at=0.0) for rank in range(2)}
    judge = Judge(membership)

    def ends(rank, serial, name, kind=None, has_communicated=False):
        worker = membership.workers[rank]
        worker.running = name
        failure = {"rank": rank, "kind": kind, "message": "m", "trace": "", "has_communicated": has_communicated}
        judge.ended(worker, (1, serial), None if kind is None else failure)
        worker.running = None

    return judge, ends


def at_once(monkeypatch):
    """A rank that is late waits for one that failed."""
    monkeypatch.setattr(judges, "STUCK_AFTER_S", -1.0)


def test_a_failure_is_not_forgotten_for_what_its_rank_did_next(ranks, monkeypatch):
    judge, ends = ranks
    ends(0, 1, "Denoise", "fault", True)
    assert judge.look() is None
    ends(0, 2, "LeaseEnded")
    assert judge.look() is None
    at_once(monkeypatch)
    found = judge.look()
    assert isinstance(found, Restart) and found.reason == "rank 0 failed in Denoise"
    assert found.cause.failure["rank"] == 0 and (found.cause.generation, found.cause.serial) == (1, 1)


def test_a_message_keeps_its_name_when_a_rank_began_the_next(ranks):
    """"LeaseEnded" is local, and would excuse what happened in the message before."""
    judge, ends = ranks
    ends(0, 1, "Denoise", "fault", True)
    ends(0, 2, "LeaseEnded")
    ends(1, 1, "Denoise", "fault", True)
    assert isinstance(judge.look(), Restart)


def test_workers_that_refuse_all_that_comes_are_restarted(ranks, monkeypatch):
    judge, ends = ranks
    ends(0, 1, "LoadModel", "fault", True)
    ends(1, 1, "LoadModel")
    assert isinstance(judge.look(), Restart)
    judge.renew()
    at_once(monkeypatch)
    ends(0, 2, "LoadModel", "fault", True)
    assert isinstance(judge.look(), Restart)


def test_a_failed_load_waits_for_slower_ranks(ranks, monkeypatch):
    judge, ends = ranks
    at_once(monkeypatch)
    judge.ask(1, 1, is_broken=False)
    ends(0, 1, "LoadModel", "memory")
    assert judge.look() is None
    assert judge.cause().failure["kind"] == "memory" and judge.cause().serial == 1
    ends(1, 1, "LoadModel")
    assert judge.look() == Keep(1, 1) and judge.look() is None
    assert judge.cause() is None


def test_a_mistake_that_all_ranks_saw_is_over(ranks, monkeypatch):
    judge, ends = ranks
    ends(0, 1, "Denoise", "input")
    ends(1, 1, "Denoise", "input")
    assert judge.look() is None
    at_once(monkeypatch)
    ends(0, 2, "Denoise")
    assert judge.look() is None
