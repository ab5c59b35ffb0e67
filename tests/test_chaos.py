"""`bench chaos`, a few rounds of it: after each fault the next job works and gives the right numbers."""

import itertools

import pytest
from comfy_xdit_bench import chaos as bench
from comfy_xdit_bench.chaos import chaos, summary
from comfy_xdit_bench.show import table

FAULTS = (
    "kill a worker",
    "stop and continue a worker",
    "kill the supervisor",
    "pool stop",
    "cancel",
    "truncate the model's file",
    "replace the model's file",
    "disconnect the other client",
)
"""Those that end differently; `comfy-xdit bench chaos` has them all."""


@pytest.mark.timeout(900)
def test_the_next_job_is_right_after_each_fault():
    rounds = list(chaos(len(FAULTS), ranks=(2,), seed=1, faults=FAULTS))
    assert sorted(entry.fault for entry in rounds) == sorted(FAULTS)
    assert not summary(rounds)["bad rounds"], table(summary(rounds))


def test_wrong_numbers_are_seen(monkeypatch):
    true, calls = bench.run_job, itertools.count(1)
    monkeypatch.setattr(bench, "run_job", lambda *args, **named: true(*args, **named) * (1 + 1e-3 * next(calls)))
    (entry,) = chaos(1, ranks=(2,), faults=["none"])
    assert entry.next_job == "wrong" and not entry.is_good
    assert summary([entry])["bad rounds"]
