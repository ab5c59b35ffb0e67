"""What a user can get wrong about a pool, each with its sentence, before any process starts."""

from __future__ import annotations

import argparse

import pytest

from comfy_xdit.cli import pool_status
from comfy_xdit.pool.client import Pool, PoolError, status
from comfy_xdit.pool.devices import describe, parse_devices
from comfy_xdit.pool.failure_policy import groups_survive, worst
from comfy_xdit.pool.folder import pool_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    return tmp_path / "h"


@pytest.mark.parametrize(
    ("text", "num_cuda", "devices"),
    [
        ("auto", 0, ["cpu", "cpu", "cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("CUDA:1, 0", 2, ["cuda:1", "cuda:0"]),
        ("cuda:0,cuda:1", 2, ["cuda:0", "cuda:1"]),
        ("cpu:2", 2, ["cpu", "cpu"]),
        ("cpu", 0, ["cpu"]),
    ],
)
def test_devices(text, num_cuda, devices):
    assert parse_devices(text, num_cuda=num_cuda, cores=3) == devices
    assert parse_devices(describe(devices), num_cuda=num_cuda) == devices


def test_auto_takes_at_most_four_processes_of_a_machine_without_a_gpu():
    assert parse_devices("auto", num_cuda=0, cores=64) == ["cpu"] * 4


@pytest.mark.parametrize(
    ("text", "num_cuda", "sentence"),
    [
        ("cuda:9", 0, "no CUDA device on this machine; use auto or cpu:2"),
        ("cuda:9", 2, "there is no cuda:9 on this machine; it has cuda:0 to cuda:1"),
        ("cuda:0,1", 1, "there is no cuda:1 on this machine; it has only cuda:0"),
        ("cuda:0,0", 2, "names cuda:0 twice"),
        ("cuda:zero", 2, "'zero' is no device index"),
        ("cpu:0", 0, "comes a number of processes, 1 to 64"),
        ("cpu:-1", 0, "comes a number of processes"),
        ("cpu:1000", 0, "1 to 64"),
        ("tpu", 0, "use auto, cuda, cuda:0,1 or cpu:2"),
        ("auto:2", 0, "use auto, cuda, cuda:0,1 or cpu:2"),
        ("", 0, "use auto, cuda, cuda:0,1 or cpu:2"),
    ],
)
def test_bad_devices(text, num_cuda, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_devices(text, num_cuda=num_cuda, cores=2)


@pytest.mark.parametrize("text", ["cpu:0", "tpu", "cuda:99"])
def test_bad_devices_are_refused_before_anything_is_made(home, text):
    with pytest.raises(PoolError, match="devices=") as told:
        Pool.connect("test", text)
    assert told.value.kind == "input"
    assert not home.exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 33, "ä"])
def test_bad_names(home, name):
    with pytest.raises(PoolError, match="cannot name a pool; use 1 to 32 letters"):
        pool_folder(name)
    assert not home.exists()


def test_a_pools_folder_is_private_even_when_it_was_not(home):
    home.mkdir(mode=0o755)
    folder = pool_folder("test")
    for path in (home, folder.path):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_the_folder_is_refused(home, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PoolError, match="belongs to someone else; set COMFY_XDIT_HOME") as told:
        pool_folder("test")
    assert str(home) not in str(told.value)


def test_a_folder_that_cannot_be_made_is_told(home):
    home.write_text("a file is in the way")
    with pytest.raises(PoolError, match=r"cannot use the folder .* \(File exists\); set COMFY_XDIT_HOME") as told:
        pool_folder("test")
    assert str(home) not in str(told.value)


def test_the_log_of_a_pool_that_has_ended_is_told_by_the_command_line_alone(home):
    log = pool_folder("test").log
    log.write_text("why it ended")
    with pytest.raises(PoolError, match="no pool 'test' runs") as told:
        status("test")
    assert str(log) not in str(told.value)
    with pytest.raises(PoolError, match=rf"no pool 'test' runs.*; log: {log}$"):
        pool_status.run(argparse.Namespace(name="test", json=False))


def test_a_path_too_long_for_a_socket_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / ("x" * 100)))
    with pytest.raises(PoolError, match="a socket's path may have 107; set COMFY_XDIT_HOME") as told:
        pool_folder("test")
    assert str(tmp_path) not in str(told.value)


def test_a_torch_without_what_a_pool_needs_is_told(home, monkeypatch):
    import torch.distributed.rpc

    monkeypatch.setattr(torch.distributed.rpc, "is_available", lambda: False)
    with pytest.raises(PoolError, match=r"needs a torch with distributed RPC.*use one on this machine"):
        Pool.connect("test", "cpu:2", transport="rpc")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(PoolError, match=r"needs Linux and a torch with torch.distributed.*use Linux, or WSL2"):
        Pool.connect("test", "cpu:2")
    assert not home.exists()


EARLY = [{"kind": kind, "has_communicated": False} for kind in ("input", "fault", "memory")]
LATE = [{"kind": kind, "has_communicated": True} for kind in ("input", "fault", "memory")]


@pytest.mark.parametrize(
    ("message", "failures", "sound"),
    [
        ("Denoise", [None, None], True),
        ("Denoise", [EARLY[0], EARLY[0]], True),
        ("Denoise", [EARLY[1], EARLY[0]], True),
        ("Denoise", [EARLY[2], EARLY[2]], False),
        ("Denoise", [EARLY[0], None], False),
        ("Denoise", [EARLY[0], LATE[0]], False),
        ("Denoise", [LATE[0], LATE[0]], False),
        ("Denoise", [LATE[1]], True),
        ("LoadModel", [EARLY[2], None], True),
    ],
)
def test_which_failures_leave_the_groups_usable(message, failures, sound):
    assert groups_survive(message, failures) is sound


def test_the_cause_is_told_before_its_consequences():
    failures = [{"kind": kind} for kind in ("fault", "lost", "memory", "fault")]
    assert worst(failures)["kind"] == "memory"
