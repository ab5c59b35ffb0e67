"""A pool that was stopped, killed or replaced between two runs: the next run starts it and chooses anew."""

import json
import os
import signal
import time

import pytest
from comfy_xdit_nodes import pool as pool_nodes
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.pool import connect

from comfy_xdit.pool.client import Pool
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.stop import stop


@pytest.fixture
def run(models, pools):
    """A run whose degrees are chosen by what the pool measured; ends with the setting."""
    model = from_checkpoint(open_checkpoint(str(models / "flux.safetensors")))
    setting = pools(2)

    def sample():
        return tiny.sample(parallelize(model, setting), cfg=1.0, steps=2)

    return setting, sample


def measured_of(setting):
    return pool_folder(setting.name).path / "measured.json"


def test_a_run_after_a_stop(run):
    setting, sample = run
    expected = sample()
    assert measured_of(setting).is_file(), "the degrees were not chosen by cost"
    stop(setting.name)
    assert (sample() - expected).abs().max() < 1e-5


def test_a_run_after_the_supervisor_was_killed(run):
    setting, sample = run
    expected = sample()
    pid = connect(setting).status()["pid"]
    os.kill(pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}/exe"):
        time.sleep(0.05)
    assert (sample() - expected).abs().max() < 1e-5


def test_what_was_measured_of_another_pool_is_not_used(run):
    setting, sample = run
    expected = sample()
    stop(setting.name)
    file = measured_of(setting)
    left = {"pool": [1, 2], "measured": json.loads(file.read_text())["measured"] | {"devices": ["Card of old"]}}
    file.write_text(json.dumps(left))
    assert (sample() - expected).abs().max() < 1e-5
    assert "Card of old" not in file.read_text()


def test_a_pool_started_anew_with_other_ranks(run, monkeypatch):
    """Somebody starts it on one rank, while this client remembers two."""
    setting, sample = run
    expected = sample()
    stop(setting.name)
    other = Pool.connect(setting.name, "cpu:1")
    other.close()
    # The node's own devices would no longer be those of the pool.
    monkeypatch.setattr(pool_nodes.connect(setting), "_asked", ("auto", True, {}))
    assert (sample() - expected).abs().max() < 1e-5
    assert connect(setting).num_ranks == 1
    stop(setting.name)
