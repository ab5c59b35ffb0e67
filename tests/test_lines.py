"""Lines between the coordinator and its visitors, where a peer doesn't read."""

import socket

import pytest

from comfy_xdit.pool import wire as wires
from comfy_xdit.pool.wire import Wire


def test_a_line_that_could_not_be_sent_whole_ends_the_connection_at_both_ends(monkeypatch):
    """What came after half a line would be taken for its rest, and nobody would miss the other half."""
    monkeypatch.setattr(wires, "SEND_TIMEOUT_S", 0.1)
    ours, theirs = (Wire(end) for end in socket.socketpair())
    with pytest.raises(ConnectionError):
        ours.send({"text": "a" * (64 << 20)})
    with pytest.raises(ConnectionError):
        ours.send({"type": "beat"})
    with pytest.raises(ConnectionError, match="the other end closed"):
        ours.read()
    with pytest.raises((ConnectionError, ValueError), match=r"closed|more than"):
        while True:
            assert theirs.read() == []
    ours.close()
    theirs.close()
