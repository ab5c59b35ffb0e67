"""A worker gives signs of life whatever its main thread and its device are busy with."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from comfy_xdit_worker import coordinator_client, loop, rank
from comfy_xdit_worker.coordinator_client import CoordinatorClient
from harness import wait_until

from comfy_xdit.pool.wire import Wire

GIB = 2**30


@pytest.fixture
def ends(monkeypatch):
    """The worker's end of a connection to the coordinator, and the coordinator's."""
    # A worker without a coordinator ends; here its threads alone.
    monkeypatch.setattr(coordinator_client.os, "_exit", sys.exit)
    before = set(threading.enumerate())
    one, other = socket.socketpair()
    wires = Wire(one), Wire(other)
    yield wires
    wires[1].close()
    for thread in set(threading.enumerate()) - before:
        thread.join()


class Device:
    """A CUDA device whose driver does one thing at a time."""

    def __init__(self, monkeypatch):
        self.context = threading.Lock()
        self.asked_by = set()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)

    def mem_get_info(self, device):
        self.asked_by.add(threading.current_thread())
        with self.context:
            return 5 * GIB, 24 * GIB


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_beats_come_while_the_driver_is_busy_and_tell_the_last_that_was_known(ends, monkeypatch):
    device, heard = Device(monkeypatch), []
    monkeypatch.setattr(coordinator_client, "BEAT_S", 0.01)
    monkeypatch.setattr(rank, "_claim", lambda *_: None)
    monkeypatch.setattr(rank, "_join_ranks", lambda *_: None)

    def busy(self):
        """As in a long copy: nobody else gets an answer of the driver."""
        with device.context:
            wait_until(lambda: heard.append(beat_after(ends[1])) or len(heard) > 3, "beats")

    monkeypatch.setattr(loop.Loop, "run", busy)
    client = CoordinatorClient(ends[0])
    client.start()
    welcome = {"pool": "p", "rank": 0, "devices": ["cuda:0"], "store": "", "residents": []}
    rank._serve(client, welcome, "fault_service:FaultService", "lo", 1)
    for status in heard:
        assert status["device_free_bytes"] == 5 * GIB and status["device_bytes"] == 3 * GIB
        assert status["device_total_bytes"] == 24 * GIB
        assert status["ram_private_bytes"] > 0 and status["models"] == []
    assert device.asked_by == {threading.main_thread()}


def fails(*_):
    raise ZeroDivisionError("of the worker's own")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("what", ["on_order", "measure"])
def test_a_worker_that_is_deaf_or_dumb_ends_and_tells_why(ends, monkeypatch, caplog, what):
    statuses = []

    def end(status):
        statuses.append(status)
        sys.exit()

    monkeypatch.setattr(coordinator_client.os, "_exit", end)
    client = CoordinatorClient(ends[0])
    setattr(client, what, fails)
    ends[1].send({"type": "leave", "generation": 1})
    client.start()
    wait_until(lambda: statuses, "the end of the process")
    assert statuses == [1]
    [record] = [record for record in caplog.records if record.exc_info]
    assert "the worker ends" in record.getMessage() and record.exc_info[0] is ZeroDivisionError


def beat_after(wire):
    """The status in the next beat that knows of the device."""

    def found():
        said = wire.wait(1.0)
        return [m["status"] for m in said if m["type"] == "beat" and "device_bytes" in m["status"]]

    return wait_until(found, "a beat")[-1]
