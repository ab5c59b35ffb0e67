"""Clients that are silent while they have the lease, and who judges a failure: all of a pool in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import torch
from fault_service import Echo, FaultService, Raise
from harness import WAIT_S, client_process, private_pool, says, stop_process, thread_states, wait_until
from played_pool import add_workers, played_pool

from comfy_xdit.cli import pool_status
from comfy_xdit.messages import Result, Status
from comfy_xdit.pool import client, grants, silence
from comfy_xdit.pool.client import Pool, PoolError


class Service(FaultService):
    """A rank whose `Status` waits for `go`, and whose `Echo` of "meta" can't be sent."""

    def __init__(self, rank, num_ranks):
        super().__init__(rank=rank, world_size=num_ranks, device=torch.device("cpu"))
        self.go = threading.Event()

    def handle(self, message):
        if isinstance(message, Status):
            self.go.wait()
            return Result(value="went")
        if isinstance(message, Echo) and message.value == "unsendable":
            return Result(value={3: "no string"})
        return super().handle(message)

    def aside(self, message):
        return Result(value="aside")


@pytest.fixture
def services():
    return [Service(rank, 2) for rank in range(2)]


@pytest.fixture
def played(tmp_path, monkeypatch, services):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    with played_pool(services) as (coordinator, links, pool):
        yield coordinator, links, pool
        for service in services:
            service.go.set()


@contextlib.contextmanager
def waiting_client():
    """Another client, in another thread: two of a process would wait for each other's lease. Gives its answers."""
    answers = []
    other = Pool.connect("test", start=False)

    def run():
        # Not `lease`: this process' lock is held by the one that is silent.
        other._acquire(None)
        other._depth += 1
        answers.append(other._exchange(Echo(value="other"), None, 60)[0].value)
        other._depth -= 1
        other._end_lease()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield answers
        thread.join(60)
    finally:
        other.close()


def fall_silent(coordinator, pool, age_s):
    """As if `pool`'s process had been stopped `age_s` ago, in its lease."""
    pool._beat.stop()
    time.sleep(0.05)
    coordinator.grants.leases.holder.heard_at = time.monotonic() - age_s


def test_a_lease_is_taken_from_a_silent_client_for_whom_others_wait_and_its_job_fails_with_a_sentence(played, services):
    coordinator, _, pool = played
    with pool.lease():
        assert pool.call(Echo(value="mine")).value == "mine"
        generation = pool.generation
        with waiting_client() as answers:
            wait_until(lambda: coordinator.grants.leases.queue, "the other client in the queue")
            fall_silent(coordinator, pool, silence.TAKE_AFTER_S + 1)
            wait_until(lambda: answers == ["other"], "the other client's answer")
        with pytest.raises(PoolError, match=r"no sign of life for 12\d s while others waited .* run the job again"):
            pool.call(Echo(value="late"))
        # It goes on in a group of its own, where nothing is left of the other's.
        assert pool.call(Echo(value="again")).value == "again"
        assert pool.generation == generation + 2
    assert coordinator.num_restarts == 0
    assert [service.journal.count("Echo") for service in services] == [3, 3], "the late message ran nowhere"


def test_a_silent_client_keeps_its_lease_as_long_as_nobody_waits(played):
    coordinator, _, pool = played
    with pool.lease():
        pool.call(Echo(value=1))
        fall_silent(coordinator, pool, 10 * silence.TAKE_AFTER_S)
        time.sleep(0.6)
        assert pool.call(Echo(value=2)).value == 2


def test_a_job_whose_lease_was_taken_while_it_ran_fails_and_gives_no_number(played, services):
    coordinator, _, pool = played
    told = []

    def run():
        with pool.lease(), pytest.raises(PoolError, match="gave no sign of life") as error:
            pool.call(Status())
        told.append(error.value.kind)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: coordinator.grants.leases.is_leased, "the lease")
    with waiting_client() as answers:
        wait_until(lambda: coordinator.grants.leases.queue, "the other client in the queue")
        fall_silent(coordinator, pool, silence.TAKE_AFTER_S + 1)
        wait_until(lambda: told == ["lost"], "the sentence")
        for service in services:
            service.go.set()
        wait_until(lambda: answers == ["other"], "the other client's answer")
    thread.join(60)


def test_those_who_wait_are_told_whose_lease_it_is_and_since_when_it_is_silent(played, caplog):
    coordinator, _, pool = played
    caplog.set_level(logging.INFO, logger="comfy_xdit")
    with pool.lease():
        pool.call(Echo(value=1))
        with waiting_client() as answers:
            wait_until(lambda: f"process {os.getpid()} has had the pool for" in caplog.text, "a word on the holder")
            fall_silent(coordinator, pool, silence.TELL_AFTER_S + 1)
            sentence = rf"process {os.getpid()} has had .* no sign of life for 1\d s; if it hangs, end it; after 120"
            wait_until(lambda: re.search(sentence, caplog.text), "a word on its silence")
            found = pool.status()
            assert found["client"]["silent_s"] > silence.TELL_AFTER_S and not found["client"]["is_stopped"]
            assert "no sign of life for" in pool_status.render(found)
            pool._beat.start()
            wait_until(lambda: pool.status()["client"]["silent_s"] < silence.TELL_AFTER_S, "a beat")
            assert not answers
            coordinator.grants.ended(coordinator.grants.leases.holder)
        assert answers == ["other"]


def test_a_client_that_works_for_long_beats_all_the_while(played):
    coordinator, _, pool = played
    with pool.lease():
        pool.call(Echo(value=1))
        holder = coordinator.grants.leases.holder
        for _ in range(2):
            before = holder.heard_at
            # This thread does something else than to talk to the pool.
            wait_until(lambda before=before: holder.heard_at > before, "a beat")
    before = holder.heard_at
    wait_until(lambda: not pool._beat._is_on.is_set(), "the end of the beats")


def test_a_stopped_process_is_told_as_such_and_goes_on_rightly_when_it_is_continued():
    with private_pool() as pool, client_process("slow") as other:
        says(other, "connected")
        says(other, "lease")
        os.kill(other.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: (pool.status()["client"] or {}).get("is_stopped"), "the kernel to stop it")
            shown = pool_status.render(pool.status())
            assert f"pid {other.pid} (in a lease" in shown and "stopped" in shown
            wait_until(lambda: pool.status()["client"]["silent_s"] > 2, "its silence")
        finally:
            os.kill(other.pid, signal.SIGCONT)
        says(other, "done")
        assert pool.call(Echo(value=1)).value == 1


@pytest.mark.parametrize("where", ["between jobs", "in a job"])
def test_the_lease_of_a_stopped_process_is_given_on_and_it_is_told_later(played, services, monkeypatch, where):
    coordinator, _, pool = played
    monkeypatch.setattr(silence, "TELL_AFTER_S", 1.5)
    for module in (silence, grants):
        monkeypatch.setattr(module, "TAKE_AFTER_S", 3.0)
    monkeypatch.setattr(grants, "TELL_AFTER_S", 1.5)

    deadline = time.monotonic() + WAIT_S

    def finish():
        """The workers' job of the client that is lost ends."""
        assert time.monotonic() < deadline, "waited in vain for the lease"
        if coordinator.grants.leases.holder is not silent:
            for service in services:
                service.go.set()

    with client_process(where) as other:
        says(other, "connected")
        says(other, "lease")
        if where == "in a job":
            workers = coordinator.membership.workers
            wait_until(lambda: {w.running for w in workers.values()} == {"Status"}, "the job on both ranks")
        silent = coordinator.grants.leases.holder
        assert silent.pid == other.pid
        stop_process(other.pid)
        try:
            assert pool.call(Echo(value="next"), poll=finish).value == "next"
            assert other.poll() is None and set(thread_states(other.pid)) == {"T"}
        finally:
            os.kill(other.pid, signal.SIGCONT)
        sentence = says(other, "told")
        assert re.match(r"this process gave no sign of life for \d+ s while others waited for pool 'test'", sentence)
        assert f"was given to process {os.getpid()}" in sentence and "run the job again" in sentence
        says(other, "done")
        assert pool.call(Echo(value="again")).value == "again"
    assert coordinator.num_restarts == 0
    assert [service.journal.count("Echo") for service in services] == [3, 3], "the late message ran nowhere"


# Who judges


def test_an_answer_that_cannot_be_packed_is_a_failure_before_it_is_reported_as_done(played):
    _, links, pool = played
    with pytest.raises(PoolError, match="cannot carry the dict key 3") as told:
        pool.call(Echo(value="unsendable"))
    assert told.value.kind == "fault"
    for link in links[:1]:
        ends = [said["failure"] for said in link.said if said["type"] == "done"]
        assert ends and ends[0]["kind"] == "fault", "reported as done before it was"


def test_the_coordinator_says_keep_after_a_mistake_that_all_ranks_saw(played):
    coordinator, _, pool = played
    with pool.lease():
        generation = pool.generation
        with pytest.raises(PoolError, match="the number 7 is too large") as told:
            pool.call(Raise(error="input", ranks=[0, 1]))
        assert told.value.kind == "input"
        assert pool.call(Echo(value=1)).value == 1
        assert pool.generation == generation and coordinator.num_restarts == 0


def test_the_client_says_what_the_coordinator_says_also_where_it_would_have_said_otherwise(played):
    """A memory error on one rank: it restarts them, and the cause is its failure, not how the connections ended."""
    coordinator, _, pool = played
    with pytest.raises(PoolError, match="ran out of memory") as told:
        pool.call(Raise(error="memory", ranks=[1]))
    assert told.value.kind == "memory" and coordinator.num_restarts == 1


def test_a_connection_that_breaks_while_its_worker_lives_restarts_the_workers(played, services):
    coordinator, _, pool = played
    with pool.lease():
        pool.call(Echo(value=1))
        threading.Timer(0.2, pool._group._channels[1].close).start()
        with pytest.raises(PoolError, match="a connection between client and workers broke; the pool restarts") as told:
            pool.call(Status())
        assert told.value.kind == "lost" and coordinator.num_restarts == 1
        for service in services:
            service.go.set()
        add_workers(coordinator, [Service(rank, 2) for rank in range(2)], attempt=1)
        assert pool.call(Echo(value=2)).value == 2


def test_a_coordinator_that_does_not_answer_is_told(played, monkeypatch):
    coordinator, _, pool = played
    monkeypatch.setattr(client, "VERDICT_LIMIT_S", 0.3)
    monkeypatch.setattr(coordinator, "_settle", lambda: None)
    with pytest.raises(PoolError, match="the supervisor of pool 'test' does not answer; run the job again") as told:
        pool.call(Raise(error="input", ranks=[0, 1]))
    assert told.value.kind == "lost"
    assert "`comfy-xdit pool status --name test` tells where the log is" in str(told.value)
    assert "/" not in str(told.value)


def test_who_waits_for_an_answer_aside_is_asked_meanwhile(played, monkeypatch):
    _, _, pool = played
    asked = []

    def poll():
        asked.append(True)
        if len(asked) == 3:
            raise KeyboardInterrupt

    with pool.lease():
        monkeypatch.setattr(pool._group, "send", lambda *message: [Future()])
        with pytest.raises(KeyboardInterrupt):
            pool.aside(Status(), poll=poll, timeout_s=600)
        assert pool.aside(Status(), poll=poll, timeout_s=0) is None
        monkeypatch.undo()
    assert len(asked) == 3


def test_workers_lost_right_after_an_answer_are_told_at_the_next_call_of_the_lease(played):
    """What the lease had sent before is gone with them; going on without a word would miss it."""
    coordinator, links, pool = played
    with pool.lease():
        assert pool.call(Echo(value=1)).value == 1
        links[0].wire.close()
        wait_until(lambda: coordinator.num_restarts == 1, "the coordinator to see it")
        with pytest.raises(PoolError, match=r"worker 0 .* ended unexpectedly"):
            pool.call(Echo(value=2))


def test_a_loss_that_is_heard_with_the_last_answer_is_told_at_the_next_call_of_the_lease(played):
    _, _, pool = played
    with pool.lease():
        pool._lost = {"type": "lost", "reason": "worker 1 ended unexpectedly", "failure": None, "restarts": True}
        with pytest.raises(PoolError, match="worker 1 ended unexpectedly; the pool restarts"):
            pool.call(Echo(value=1))
        assert pool.call(Echo(value=2)).value == 2
    pool._lost = {"type": "lost", "reason": "of a lease that is over", "failure": None, "restarts": True}
    assert pool.call(Echo(value=3)).value == 3


def test_a_client_that_stops_while_it_joins_costs_no_restart(played, monkeypatch):
    coordinator, _, pool = played
    monkeypatch.setattr("comfy_xdit.pool.grants.JOIN_LIMIT_S", 0.3)
    stopped = Pool.connect("test", start=False)
    stopped._wire.send({"type": "lease", "generation": 0})
    assert pool.call(Echo(value=1)).value == 1
    assert coordinator.num_restarts == 0
    stopped.close()


def test_an_answer_beyond_the_limit_is_a_failure_and_the_connection_stays(played, services, monkeypatch):
    coordinator, _, pool = played
    with pool.lease():
        generation = pool.generation
        with monkeypatch.context() as patch:
            patch.setattr("comfy_xdit.pool.sockets.MAX_TEXT_BYTES", 4000)
            for service in services:
                patch.setattr(service, "aside", lambda message: Result(value="x" * 5000))
                patch.setattr(service, "handle", service.aside)
            assert pool.aside(Status()) is None
            assert pool._group.is_current
            with pytest.raises(PoolError, match=r"an answer's text of \d+ bytes; the limit is 4000") as told:
                pool.call(Echo(value="long"))
        assert told.value.kind == "input"
        assert pool.call(Echo(value="next")).value == "next"
        assert pool.generation == generation and coordinator.num_restarts == 0
