"""Nothing that a peer says, or leaves unsaid, ends the coordinator or stays in it for ever."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from harness import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from played import Played, hears, played_coordinator

from comfy_xdit.pool import connections, membership
from comfy_xdit.pool.fields import Malformed, integer, one_of, table, text, texts
from comfy_xdit.pool.handshake import prove, read_key
from comfy_xdit.pool.wire import Wire, versions


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    # A played worker is this process.
    monkeypatch.setattr(membership.os, "kill", lambda pid, number: None)


@pytest.fixture
def coordinator(home):
    """Of a pool on this machine."""
    with played_coordinator(1) as coordinator:
        yield coordinator


@pytest.fixture
def network_coordinator(home):
    with played_coordinator(2) as coordinator:
        yield coordinator


def local(coordinator):
    return Wire.connect(coordinator.folder.socket)


def remote(coordinator):
    """A connection over the network that has proved itself."""
    wire = Wire.connect((coordinator.network.address, coordinator.network.port))
    prove(wire, read_key(coordinator.folder.key))
    return wire


def answers(coordinator):
    wire = local(coordinator)
    wire.send({"type": "status"})
    found = hears(wire)
    wire.close()
    return found["type"] == "status"


# What peers say


GREETING = {"type": "worker", "machine": 1, "local_rank": 0, "num_local": 1, "host": "h", "pid": 1}
NO_NUMBERS = ["1e999", "-1e999", "NaN", "true", "1.0", '"1"', "null", "[]", "9" * 400]


@pytest.mark.parametrize("field", ["machine", "local_rank", "num_local", "pid"])
@pytest.mark.parametrize("number", NO_NUMBERS)
def test_what_is_no_number_drops_the_peer_and_nobody_else(network_coordinator, field, number):
    wire = remote(network_coordinator)
    greeting = json.dumps(GREETING | {"versions": versions(), field: "HERE"}).replace('"HERE"', number)
    wire.sock.sendall(greeting.encode() + b"\n")
    assert hears(wire) is None
    assert answers(network_coordinator) and not network_coordinator.has_workers


def test_an_error_that_nobody_thought_of_drops_the_peer(network_coordinator, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(network_coordinator._rendezvous, "greet", fails)
    wire = remote(network_coordinator)
    wire.send(GREETING)
    assert hears(wire) is None
    assert answers(network_coordinator)


@pytest.mark.parametrize(
    "failure", [{}, [], {"rank": 0, "kind": "novel", "message": "", "trace": ""}, {"rank": 2, "kind": "fault"}]
)
def test_a_failure_of_no_sense_costs_the_worker_and_nobody_else(coordinator, failure):
    """Told in time, since the coordinator judges by it in every tick."""
    worker = local(coordinator)
    worker.send({"type": "worker", "rank": 0, "attempt": 0})
    assert hears(worker)["type"] == "welcome"
    worker.send({"type": "done", "generation": 1, "serial": 1, "failure": failure})
    assert hears(worker) is None
    assert answers(coordinator) and coordinator.num_restarts == 1


KINDS = st.sampled_from(
    (
        "client",
        "worker",
        "status",
        "lease",
        "end",
        "joined",
        "restart",
        "beat",
        "met",
        "up",
        "failed",
        "residents",
        "began",
        "done",
        "prepared",
        "join_failed",
        "proof",
        "challenge",
        "welcome",
        "tried",
    )
)
NAMES = st.sampled_from(
    (
        "generation",
        "serial",
        "failure",
        "status",
        "message",
        "messages",
        "reason",
        "rank",
        "attempt",
        "machine",
        "local_rank",
        "num_local",
        "pid",
        "host",
        "versions",
        "number",
        "proof",
        "kind",
        "trace",
        "step",
        "peers",
        "environment",
    )
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.just("\ud800")
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4)
)
MESSAGES = st.builds(
    lambda kind, fields: {**fields, "type": kind}, KINDS | VALUES, st.dictionaries(NAMES, VALUES, max_size=6)
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFY_XDIT_HOME", str(tmp_path_factory.mktemp("h")))
        patch.setattr(membership.os, "kill", lambda pid, number: None)
        with played_coordinator(1) as one, pytest.MonkeyPatch.context() as inner:
            inner.setenv("COMFY_XDIT_HOME", str(tmp_path_factory.mktemp("h")))
            with played_coordinator(2) as several:
                yield {"local": (one, local), "remote": (several, remote)}


START = {
    "nobody": [],
    "a client": [{"type": "client"}],
    "a worker": [{"type": "worker", "rank": 0, "attempt": 0}],
    "a client that waits": [{"type": "client"}, {"type": "lease", "generation": 0}],
    "a worker of another machine": [GREETING | {"versions": versions()}],
}


@pytest.mark.parametrize("way", ["local", "remote"])
@pytest.mark.parametrize("start", START)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(said=st.lists(MESSAGES, min_size=1, max_size=4))
def test_no_message_ends_the_coordinator(fuzzed, way, start, said):
    coordinator, connect = fuzzed[way]
    wire = connect(coordinator)
    with contextlib.suppress(ConnectionError):
        for message in START[start] + said:
            wire.send(message)
    wire.close()
    assert answers(coordinator)


@pytest.mark.parametrize("way", ["local", "remote"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
def test_no_bytes_end_the_coordinator(fuzzed, way, data):
    coordinator, connect = fuzzed[way]
    wire = connect(coordinator)
    with contextlib.suppress(OSError):
        wire.sock.sendall(data + b"\n")
    wire.close()
    assert answers(coordinator)


@given(value=VALUES)
def test_a_checked_field_is_what_it_says(value):
    message = {"x": value}
    for check, kind in ((integer, int), (text, str), (texts, list), (table, dict)):
        try:
            found = check(message, "x")
        except Malformed:
            continue
        assert type(found) is kind and found == value
    with pytest.raises(Malformed):
        integer(message, "lacking")


def test_fields_have_bounds():
    assert integer({"x": 3}, "x", low=3, high=3) == 3
    for value in (2, 4, True, 3.0, float("inf")):
        with pytest.raises(Malformed, match="'x' is no whole number from 3 to 3"):
            integer({"x": value}, "x", low=3, high=3)
    with pytest.raises(Malformed, match="'x' is no string of at most 2 characters"):
        text({"x": "abc"}, "x", max_chars=2)
    with pytest.raises(Malformed, match="'x' is no list of at most 1 strings"):
        texts({"x": ["a", "b"]}, "x", max_items=1)
    with pytest.raises(Malformed, match="'x' is no string"):
        texts({"x": [1]}, "x")
    assert one_of({"x": "a"}, "x", ("a", "b")) == "a"
    with pytest.raises(Malformed, match="'x' is none of a, b"):
        one_of({"x": ["a"]}, "x", ("a", "b"))


# What they leave unsaid


def silent(coordinator):
    return local(coordinator)


def silent_before_its_proof(coordinator):
    wire = Wire.connect((coordinator.network.address, coordinator.network.port))
    assert hears(wire)["type"] == "challenge"
    return wire


def slow(coordinator):
    wire = local(coordinator)
    wire.sock.sendall(b'{"type": "sta')
    return wire


@pytest.mark.parametrize("peer", [silent, silent_before_its_proof, remote, slow], ids=lambda peer: peer.__name__)
def test_who_does_not_say_who_it_is_is_dropped(network_coordinator, monkeypatch, peer):
    monkeypatch.setattr(connections, "NEWCOMER_LIMIT_S", 0.5)
    client = local(network_coordinator)
    client.send({"type": "client"})
    assert hears(client)["type"] == "welcome"
    wire = peer(network_coordinator)
    assert hears(wire) is None
    assert not network_coordinator._connections._newcomers
    # Who said it may be silent as long as it likes.
    assert client.wait(1.0) == []
    client.close()


@pytest.mark.parametrize("peer", [silent, silent_before_its_proof])
def test_newcomers_are_bounded_and_a_flood_at_one_coordinator_leaves_the_other(network_coordinator, monkeypatch, peer):
    monkeypatch.setattr(connections, "MAX_NEWCOMERS", 5)
    crowd = [peer(network_coordinator) for _ in range(20)]
    wait_until(lambda: hears_end(crowd[14]), "the oldest to be dropped")
    assert answers(network_coordinator)
    worker = Played(network_coordinator, 1)
    wait_until(lambda: network_coordinator.has_workers, "a worker that says who it is")
    assert len(network_coordinator._connections._newcomers) <= 5
    for wire in (*crowd, worker.wire):
        wire.close()


def hears_end(wire):
    try:
        return wire.wait(0.1) and False
    except ConnectionError:
        return True


def test_without_room_for_a_descriptor_the_coordinator_pauses_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(connections, "PAUSE_S", 1e9)
    listener = connections.listener_at(tmp_path / "socket")
    open_ones = connections.Connections()
    open_ones.listen(listener)
    client = Wire.connect(tmp_path / "socket")
    client.send({"type": "status"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(2):
            assert list(open_ones.wait(10)) == []
            # Nothing is reported any more, so the next wait really waits.
            assert open_ones._selector.select(0) == []
            open_ones._paused[listener] = 0.0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [record.getMessage() for record in caplog.records] == [
        "coordinator: cannot let anybody in (Too many open files); tried again every 1e+09 s"
    ]
    assert list(open_ones.wait(10)) == []
    [newcomer] = open_ones.wait(10)
    assert open_ones.read(newcomer) == [{"type": "status"}]
    open_ones._pause(listener, OSError())
    open_ones.unlisten(listener)
    open_ones.drop(newcomer)
    client.close()


def test_a_connection_that_is_reset_at_once_is_forgotten(network_coordinator):
    for _ in range(20):
        with socket.create_connection((network_coordinator.network.address, network_coordinator.network.port)) as sock:
            # Closed with a reset.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert answers(network_coordinator)
    wait_until(lambda: not network_coordinator._connections._newcomers, "their end")
