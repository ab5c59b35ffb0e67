"""What workers inherit, and what not, from whoever starts a pool."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from fault_service import Reduce
from harness import NAME, private_pool, worker_pids

from comfy_xdit import cli
from comfy_xdit.pool import start as start_module
from comfy_xdit.pool.environment import ALLOCATOR, DROPPED, DROPPED_PREFIXES, hidden, settle, told
from comfy_xdit.pool.folder import pool_folder

STARTERS = {
    "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    "CUDA_LAUNCH_BLOCKING": "1",
    "DIFFUSERS_ATTN_BACKEND": "flex",
    "NVIDIA_TF32_OVERRIDE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "eth0",
}


def test_workers_have_their_own_environment_and_users_are_told(monkeypatch, capsys):
    for name, value in STARTERS.items():
        monkeypatch.setenv(name, value)
    with private_pool() as pool:
        assert pool.call(Reduce(value=1.0)).value == 2.0
        for pid in [pool.status()["pid"], *worker_pids(pool)][1:]:
            own = dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if entry)
            assert (
                own["PYTORCH_CUDA_ALLOC_CONF"] == own["PYTORCH_ALLOC_CONF"] == ALLOCATOR == "expandable_segments:True"
            )
            assert own["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
            assert own["NCCL_P2P_DISABLE"] == "1"
            assert own["NCCL_SOCKET_IFNAME"] == own["GLOO_SOCKET_IFNAME"] == own["TP_SOCKET_IFNAME"] == "lo"
            assert not own.keys() & {"CUDA_LAUNCH_BLOCKING", "DIFFUSERS_ATTN_BACKEND", "NVIDIA_TF32_OVERRIDE"}
        capsys.readouterr()
        assert cli.main(["pool", "status", "--name", NAME]) == 0
        said = capsys.readouterr().out
        assert "environment: CUDA_DEVICE_MAX_CONNECTIONS=32, " in said and "NCCL_P2P_DISABLE=1" in said
        assert "left out of it: PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync, CUDA_LAUNCH_BLOCKING=1, DIFF" in said
        assert cli.main(["pool", "status", "--json", "--name", NAME]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["environment"]["dropped"]["DIFFUSERS_ATTN_BACKEND"] == "flex"
        assert found["environment"]["replaced"] == {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
        assert [rank["environment"]["CUDA_DEVICE_MAX_CONNECTIONS"] for rank in found["ranks"]] == ["32", "32"]
        log = pool_folder(NAME).log.read_text()
        assert "CUDA_LAUNCH_BLOCKING=1 is left out (each receive would be waited for on the spot)" in log
        assert "PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync gives way to expandable_segments:True" in log
    # Of the one who started it nothing was changed.
    assert {name: os.environ.get(name) for name in STARTERS} == STARTERS


@pytest.mark.parametrize("name", [*DROPPED, *(prefix + "X" for prefix in DROPPED_PREFIXES)])
def test_what_changes_numbers_or_hangs_is_left_out(name):
    environment = {name: "1", "PATH": "/bin"}
    changes = settle(environment, interface="eth0", nccl_interface="=eth0")
    assert name not in environment and environment["PATH"] == "/bin" and changes.dropped == {name: "1"}
    assert f"{name}=1 is left out (" in str(changes)
    assert environment["NCCL_SOCKET_IFNAME"] == "=eth0" and environment["GLOO_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize(
    "name", ["NCCL_P2P_DISABLE", "NCCL_DEBUG", "NCCL_IB_DISABLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"]
)
def test_what_users_say_to_nccl_is_kept_and_told(name):
    environment = {name: "1"}
    changes = settle(environment, interface="lo", nccl_interface="lo")
    assert told(environment)[name] == "1" and str(changes) == ""


def test_settling_twice_changes_nothing():
    environment = {"DIFFUSERS_X": "1"}
    settle(environment, interface="lo", nccl_interface="lo")
    before = dict(environment)
    changes = settle(environment, interface="lo", nccl_interface="lo")
    assert environment == before and not changes.dropped and not changes.replaced


@pytest.fixture
def machine(tmp_path):
    """A machine with four GPUs of NVIDIA and two of AMD (whose list begins with a CPU)."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    for number, gpu in enumerate(("0", "4660", "4661")):
        node = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(number)
        node.mkdir(parents=True)
        (node / "gpu_id").write_text(gpu + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "3,2,1,0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "CUDA_VISIBLE_DEVICES='1' leaves the pool 1 of this machine's 4 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, "CUDA_VISIBLE_DEVICES='1,0' leaves the pool 2 of this machine's 4 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' leaves the pool 0 of"),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, "leaves the pool 1 of this machine's 4 GPUs"),
        ({"HIP_VISIBLE_DEVICES": "0,1"}, ""),
        ({"HIP_VISIBLE_DEVICES": "1"}, "HIP_VISIBLE_DEVICES='1' leaves the pool 1 of this machine's 2 GPUs"),
    ],
)
def test_gpus_that_a_variable_hides_are_told(machine, environment, sentence):
    said = hidden(environment, machine)
    assert said.startswith(sentence) if sentence.startswith(("C", "H")) else sentence in said
    assert bool(said) == bool(sentence)


def test_a_machine_without_gpus_hides_none(tmp_path):
    assert hidden({"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "0"}, tmp_path) == ""


def test_the_program_that_starts_a_pool_logs_what_its_flag_hides(monkeypatch, caplog):
    monkeypatch.setattr(start_module, "hidden", lambda environment: f"hidden by {environment['CUDA_VISIBLE_DEVICES']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with caplog.at_level(logging.WARNING, "comfy_xdit"), private_pool("cpu:1"):
        assert "hidden by 1" in caplog.messages
