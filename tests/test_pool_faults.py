"""Workers that die, hang, fail and run out of memory: one sentence for the job, and the pool goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from comfy_xdit_bench.heal import heal, render
from fault_service import Echo, Journal, Keep, Raise, Reduce, Sleep
from harness import client_process, private_pool, says, wait_until, wait_until_gone, worker_pids

from comfy_xdit.pool.client import PoolError

NUM_CYCLES = int(os.environ.get("COMFY_XDIT_HEAL_CYCLES", "3"))


@pytest.fixture(scope="module")
def pool():
    with private_pool() as pool:
        pool.call(Keep(name="warm"))
        yield pool
        # Whatever the tests did, the pool is whole at the end.
        assert pool.call(Reduce(value=1.0)).value == 2.0


def assert_healed(pool, old_pids, generation):
    """The same object works, on new workers that hold what the old ones held."""
    assert pool.call(Reduce(value=1.0)).value == 2.0
    assert not set(worker_pids(pool)) & set(old_pids)
    wait_until_gone(old_pids)
    assert pool.generation > generation
    assert pool.call(Journal()).value[0] == "Keep"
    wait_until(lambda: all(r.get("models") == ["warm"] for r in pool.status()["ranks"]), "the reloaded model")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_before_a_job(pool, rank):
    pids, generation = worker_pids(pool), pool.generation
    os.kill(pids[rank], signal.SIGKILL)
    wait_until_gone(pids)
    assert_healed(pool, pids, generation)


def test_a_worker_killed_between_jobs_locks_nobody_out(pool):
    pool.call(Echo(value=1))
    pids = worker_pids(pool)
    os.kill(pids[0], signal.SIGKILL)
    wait_until_gone(pids[:1])

    def is_healed():
        found = worker_pids(pool)
        return len(found) == 2 and not set(found) & set(pids) and pool.status()["state"] == "ready"

    wait_until(is_healed, "new workers")
    # Asks for its lease before it has read that its group is gone, and then once more.
    assert pool.call(Reduce(value=1.0)).value == 2.0
    assert not pool.status()["queue"] and not pool.status()["client"]["is_leased"]
    with client_process("slow") as other:
        says(other, "connected")
        says(other, "lease")
        assert pool.call(Reduce(value=2.0)).value == 4.0
        says(other, "done")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "job", [Sleep(seconds=600), Reduce(value=1.0, rounds=10**9)], ids=["busy", "collective"]
)
def test_a_worker_killed_in_a_job(pool, rank, job):
    pids, generation = worker_pids(pool), pool.generation
    threading.Timer(0.3, os.kill, (pids[rank], signal.SIGKILL)).start()
    with pytest.raises(PoolError) as told:
        pool.call(job)
    assert told.value.kind == "lost"
    sentence = str(told.value)
    assert "\n" not in sentence and "run the job again" in sentence and "the log is" in sentence
    assert_healed(pool, pids, generation)


def test_a_job_that_comes_further_may_take_longer(pool):
    pids = worker_pids(pool)
    pool.call(Sleep(seconds=1.5), poll=lambda: True, timeout_s=0.7)
    assert worker_pids(pool) == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_after_a_job_within_the_lease(pool, rank):
    pids, generation = worker_pids(pool), pool.generation
    with pool.lease():
        pool.call(Echo(value=1))
        os.kill(pids[rank], signal.SIGKILL)
        with pytest.raises(PoolError, match=f"worker {rank} .* ended unexpectedly"):
            pool.call(Sleep(seconds=600))
        assert_healed(pool, pids, generation)


def test_a_stopped_worker_is_found_and_replaced(pool):
    pids, generation = worker_pids(pool), pool.generation
    threading.Timer(0.3, os.kill, (pids[1], signal.SIGSTOP)).start()
    with pytest.raises(PoolError, match="gave no sign of life"):
        pool.call(Reduce(value=1.0, rounds=10**9))
    assert_healed(pool, pids, generation)


def test_a_job_that_takes_too_long_restarts_the_workers(pool):
    pids, generation = worker_pids(pool), pool.generation
    with pytest.raises(PoolError, match=r"no answer to Sleep within 0\.5 s"):
        pool.call(Sleep(seconds=600), timeout_s=0.5)
    assert_healed(pool, pids, generation)


@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=["all ranks", "one rank"])
@pytest.mark.parametrize("meet", [False, True], ids=["apart", "others in a collective"])
def test_out_of_memory_is_a_sentence_with_what_to_do(pool, ranks, meet):
    pids, generation = worker_pids(pool), pool.generation
    with pytest.raises(
        PoolError, match=r"ran out of memory \(Tried to allocate 20.00 GiB\); use a smaller"
    ) as told:
        pool.call(Raise(error="memory", ranks=ranks, meet=meet))
    assert told.value.kind == "memory"
    # Ranks run out of memory one before the other, so the groups between them can't be used again.
    assert_healed(pool, pids, generation)


def test_a_mistake_that_all_ranks_see_costs_no_restart(pool):
    pids, generation = worker_pids(pool), pool.generation
    with pytest.raises(PoolError, match="the number 7 is too large; use 6 or less") as told:
        pool.call(Raise(error="input", ranks=[0, 1]))
    assert told.value.kind == "input"
    assert pool.call(Reduce(value=1.0)).value == 2.0
    assert worker_pids(pool) == pids and pool.generation == generation


def test_a_bug_on_one_rank_is_told_with_its_trace_and_frees_the_others(pool):
    pids, generation = worker_pids(pool), pool.generation
    with pytest.raises(PoolError, match="worker 0 failed: KeyError: 'a bug'") as told:
        pool.call(Raise(error="fault", ranks=[0], meet=True))
    assert told.value.kind == "fault" and "fault_service.py" in told.value.trace
    assert_healed(pool, pids, generation)


class GaveUp(Exception):
    pass


def give_up():
    raise GaveUp


@pytest.mark.parametrize("error", ["fault", "memory"])
@pytest.mark.parametrize("in_one_lease", [True, False])
def test_a_job_is_not_told_the_fault_of_one_that_was_given_up_as_its_own(pool, error, in_one_lease):
    """One rank fails, the other waits for it, and the next job for both."""
    pids, generation = worker_pids(pool), pool.generation
    with pool.lease() if in_one_lease else contextlib.nullcontext():
        with pytest.raises(GaveUp):
            pool.call(Raise(error=error, ranks=[0], meet=True), poll=give_up)
        with pytest.raises(PoolError) as told:
            pool.call(Echo(value=1))
    assert told.value.kind == "lost"
    assert re.fullmatch(
        r"the run before this one, which was given up, failed later: worker 0 .*(a bug|out of memory).*; "
        "the pool restarts its workers for that, so run the job again",
        str(told.value),
    )
    assert_healed(pool, pids, generation)


def test_a_bug_that_nobody_waits_for_any_more_restarts_the_workers_all_the_same(pool):
    """One rank fails and is free for what comes next, while the other waits for it."""
    with pytest.raises(GaveUp):
        pool.call(Raise(error="fault", ranks=[0], meet=True), poll=give_up)
    pids = worker_pids(pool)
    wait_until(lambda: not set(worker_pids(pool)) & set(pids), "new workers")
    assert pool.call(Reduce(value=1.0)).value == 2.0


def test_kill_and_heal_again_and_again(pool):
    report = heal(pool, NUM_CYCLES)
    assert len(report.cycles) == NUM_CYCLES and report.orphans == []
    # The first cycles still fill caches; a leak of a group's buffers would be 8 MiB and more a cycle.
    for name in ("supervisor_bytes", "client_bytes", "worker_bytes"):
        held = [getattr(cycle, name) for cycle in report.cycles]
        assert held[-1] - held[0] < (4 << 20) * max(8, len(held)), name
    assert f"{NUM_CYCLES} workers killed" in render(report)
