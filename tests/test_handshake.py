"""The key of a pool on several machines: a coordinator lets nobody in without it, nor commands a worker."""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from comfy_xdit_worker import join
from played import Played, free_port, hears, played_coordinator

from comfy_xdit.cli.pool_start import missing_on
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.fields import Malformed
from comfy_xdit.pool.handshake import KEY_VARIABLE, Challenge, given_key, kept_key, prove, read_key
from comfy_xdit.pool.network import Network
from comfy_xdit.pool.wire import Wire

KEY, OTHER = b"k" * 32, b"o" * 32
PLACE = "10.0.0.1:29600"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))


class Server:
    """Answers one connection with what `play` says."""

    def __init__(self, play):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.place = self.listener.getsockname()
        self.heard = []
        self.thread = threading.Thread(target=self._serve, args=(play,), daemon=True)
        self.thread.start()

    def _serve(self, play):
        connection, _ = self.listener.accept()
        wire = Wire(connection)
        play(wire, self)
        wire.close()
        self.listener.close()


def proves_with(key):
    def play(wire, server):
        challenge = Challenge(key, "{}:{}".format(*server.place))
        wire.send(challenge.question)
        server.heard.append(hears(wire))
        wire.send(challenge.answer(server.heard[-1]))
        server.heard.append(hears(wire))

    return play


def test_both_ends_prove_themselves():
    server = Server(proves_with(KEY))
    wire = Wire.connect(server.place)
    prove(wire, KEY)
    wire.send({"type": "worker"})
    server.thread.join()
    assert server.heard[1] == {"type": "worker"}
    assert KEY.hex() not in json.dumps(server.heard)


def test_a_false_coordinator_hears_no_greeting_and_commands_nobody():
    def play(wire, server):
        wire.send(Challenge(OTHER, "x").question)
        server.heard.append(hears(wire))
        # It answers the worker's number with the key that it has.
        wire.send({"type": "proof", "proof": "0" * 64})
        server.heard.append(hears(wire))

    server = Server(play)
    wire = Wire.connect(server.place)
    with pytest.raises(PoolError, match=r"is not this pool's coordinator .* with the key file that it names"):
        prove(wire, KEY)
    wire.close()
    server.thread.join()
    assert server.heard[0]["type"] == "proof" and server.heard[1] is None


@pytest.mark.parametrize("said", [{"type": "end"}, {"type": "welcome", "rank": 0}, {"type": "challenge", "number": 1}])
def test_a_coordinator_that_proves_nothing_is_left(said):
    server = Server(lambda wire, _: wire.send(said))
    with pytest.raises(PoolError, match="is not this pool's coordinator"):
        join._come_in(server.place, KEY, {"type": "worker"}, None)


def test_a_proof_sent_back_is_none():
    """Neither a worker's proof as the coordinator's, nor one for another number or another coordinator."""
    challenge = Challenge(KEY, PLACE)
    asked = challenge.question["number"]
    server = Server(
        lambda wire, server: (wire.send({"type": "challenge", "number": asked}), server.heard.append(hears(wire)))
    )
    wire = Wire.connect(server.place)
    with pytest.raises(ConnectionError):
        prove(wire, KEY)
    server.thread.join()
    # It was made for the address that the worker reached: passed on to the true coordinator it opens nothing.
    with pytest.raises(Malformed, match="does not hold this pool's key"):
        challenge.answer(server.heard[0])
    there = Challenge(KEY, "{}:{}".format(*server.place))
    there._number = asked
    proof = there.answer(server.heard[0])
    assert proof["proof"] != server.heard[0]["proof"]
    with pytest.raises(Malformed):
        Challenge(KEY, "{}:{}".format(*server.place)).answer(server.heard[0])


@pytest.mark.parametrize(
    "changes",
    [{"proof": None}, {"proof": "x"}, {"proof": "0" * 64}, {"proof": "\u00e9" * 64}, {"number": 1}, {"type": "worker"}],
)
def test_what_is_no_proof_is_refused_by_the_coordinator(home, changes):
    with played_coordinator(2) as coordinator:
        wire = Wire.connect((coordinator.network.address, coordinator.network.port))
        assert hears(wire)["type"] == "challenge"
        wire.send({"type": "proof", "number": "0" * 64, "proof": "0" * 64} | changes)
        assert hears(wire)["type"] == "refused" and hears(wire) is None
        assert Played(coordinator, 1).hears_nothing(), "who has the key is let in as ever"


def test_a_worker_with_another_key_is_told(home):
    sentence = "let this worker not in: it does not hold this pool's"
    with played_coordinator(2) as coordinator, pytest.raises(PoolError, match=sentence):
        join._come_in((coordinator.network.address, coordinator.network.port), OTHER, {"type": "worker"}, None)


def test_the_store_of_an_attempt_has_a_name_that_nobody_guesses(home):
    with played_coordinator(2) as coordinator:
        told = [Played(coordinator, number).hears for number in range(2)]
        (store,) = {hears()["store"] for hears in told}
        again = coordinator._stores.for_ranks(0)
    assert store.rpartition("-")[0] == again.rpartition("-")[0] and store != again
    assert len(store.rpartition("-")[2]) == 32


# The key


def test_a_key_is_made_once_and_is_for_its_owner_only(tmp_path):
    path = tmp_path / "key"
    key = kept_key(path)
    assert len(key) == 32 and kept_key(path) == read_key(path) == key != kept_key(tmp_path / "another")
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["another", "key"]
    path.chmod(0o640)
    with pytest.raises(PoolError, match=r"others can read the pool's key in .*; run chmod 600"):
        read_key(path)


@pytest.mark.parametrize("content", [b"", b"secret", b"\xff" * 64, b"g" * 64, b"0" * 66])
def test_what_is_no_key_is_told(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(PoolError, match="copy the head's"):
        read_key(path)


def test_a_worker_is_given_the_key_by_a_file_or_a_variable(tmp_path):
    key = kept_key(tmp_path / "key")
    assert given_key(tmp_path / "key", {}) == key
    assert given_key(None, {KEY_VARIABLE: key.hex()}) == key
    with pytest.raises(PoolError, match=r"give its file with --key-file, or the key itself in \$COMFY_XDIT_KEY"):
        given_key(None, {})
    with pytest.raises(PoolError, match=r"cannot read the pool's key in .* \(No such file or directory\)"):
        given_key(tmp_path / "lacking", {})


def test_no_command_line_holds_the_key(tmp_path):
    key = kept_key(tmp_path / "key")
    network = Network(num_machines=2, interface="lo", address="127.0.0.1", port=free_port())
    said = missing_on(network, 2, "pool 'x' waits; …", tmp_path / "key")
    assert said.count(f"--key-file {tmp_path / 'key'}") == 2 and key.hex() not in said
    assert f"The pool's key is in {tmp_path / 'key'}: copy" in said and f"or set {KEY_VARIABLE}" in said
