"""The transport of one machine: what arrives, who owns which memory, and peers that die, stall and lie."""

from __future__ import annotations

import fcntl
import gc
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

from comfy_xdit.pool import parcel
from comfy_xdit.pool.client import Pool
from comfy_xdit.pool.connections import pairs
from comfy_xdit.pool.descriptor import Descriptor, receive
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.parcel import F_ADD_SEALS, INLINE_BYTES, SEALS, Parcel, pack, unpack
from comfy_xdit.pool.sockets import HEAD, MAGIC, MAX_TEXT_BYTES, SocketClient, SocketWorker
from comfy_xdit.pool.transport import ASIDE
from comfy_xdit.pool.wire import Wire

LIMIT_S = 60
LARGE = INLINE_BYTES // 4 + 1
"""Numbers of float32 that go in a memfd."""


def until(condition, what):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"waited in vain for {what}")


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("comfy-xdit-")} - OTHERS


OTHERS: set[threading.Thread] = set()
"""What another file's tests left running in this process."""


@pytest.fixture(autouse=True)
def others():
    OTHERS.clear()
    OTHERS.update(threads())


def duplicate(sock):
    return Descriptor(os.dup(sock.fileno()))


class Link:
    """A client and its workers in this process. `serve` takes (rank, request)."""

    def __init__(self, num_ranks, serve):
        with pairs(num_ranks) as (client_ends, worker_ends):
            mine = [duplicate(end) for end in client_ends]
            theirs = [duplicate(end) for end in worker_ends]
        self.workers = [
            SocketWorker(1, fd, lambda request, rank=rank: serve(rank, request)) for rank, fd in enumerate(theirs)
        ]
        self.client = SocketClient(1, mine)

    def ask(self, text="", tensors=(), ranks=None, serial=1):
        ranks = range(len(self.workers)) if ranks is None else ranks
        return self.client.send(ranks, serial, text, list(tensors))

    def close(self):
        self.client.leave()
        for worker in self.workers:
            worker.leave()


def echo(rank, request):
    request.pack(f"{rank}:{request.text}", request.tensors)()


@pytest.fixture
def link():
    before = descriptors()
    link = Link(2, echo)
    yield link
    link.close()
    until(lambda: not threads(), "the end of the threads")
    gc.collect()
    assert descriptors() <= before


@pytest.fixture
def bare():
    """A client's group whose one peer is the bare socket that the test has."""
    with pairs(1) as ([client_end], [worker_end]):
        client = SocketClient(1, [duplicate(client_end)])
        peer = worker_end.dup()
    yield client, peer
    client.leave()
    peer.close()


TENSORS = [
    torch.randn(3, 5).to(torch.bfloat16),
    torch.tensor(3),
    torch.empty(0, 4),
    torch.randn(7, dtype=torch.float64),
    torch.tensor([True, False, True]),
    torch.randn(9).to(torch.float8_e4m3fn),
    torch.randn(3, dtype=torch.complex64),
    torch.arange(5, dtype=torch.int8),
]


def same(one, other):
    raw = [tensor.reshape(-1).contiguous().view(torch.uint8) if tensor.numel() else tensor for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


@pytest.mark.parametrize("extra", [[], [torch.randn(LARGE)]], ids=["inline", "memfd"])
def test_texts_and_tensors_arrive_as_they_were(link, extra):
    sent = [*TENSORS[:4], *extra, *TENSORS[4:]]
    for rank, future in enumerate(link.ask('{"ä": 1}', sent)):
        text, tensors = future.result(LIMIT_S)
        assert text == f'{rank}:{{"ä": 1}}'
        assert len(tensors) == len(sent) and all(map(same, sent, tensors))


def test_a_tensor_may_be_written_to_where_it_arrives_and_nobody_else_sees_it():
    arrived = {}

    def serve(rank, request):
        arrived[rank] = request.tensors[0]
        request.tensors[0].fill_(rank)
        request.pack("", request.tensors)()

    link, sent = Link(2, serve), torch.full((LARGE,), 7.0)
    answers = [future.result(LIMIT_S)[1][0] for future in link.ask(tensors=[sent])]
    answers[0].fill_(9.0)
    assert sent.unique().tolist() == [7.0]
    assert [tensor.unique().tolist() for tensor in (arrived[0], arrived[1], answers[1])] == [[0.0], [1.0], [1.0]]
    link.close()


def mapped():
    return sum("comfy-xdit" in line for line in open("/proc/self/maps"))


def test_thousands_of_tensors_and_of_held_results_need_no_descriptors(link):
    link.ask()[0].result(LIMIT_S)
    before = descriptors()
    many = [torch.full((100,), float(i)) for i in range(3000)]
    held = [future.result(LIMIT_S)[1] for future in link.ask(tensors=many)]
    assert all(torch.equal(one, other) for tensors in held for one, other in zip(many, tensors, strict=True))
    held += [link.ask(tensors=[torch.randn(LARGE)], ranks=[0])[0].result(LIMIT_S)[1] for _ in range(300)]
    until(lambda: descriptors() <= before, "the closing of all descriptors")
    assert mapped() > 300
    held.clear()
    gc.collect()
    until(lambda: mapped() == 0, "the end of all mappings")


def test_what_was_sent_and_read_is_not_held_while_nothing_goes_on(link):
    link.ask(tensors=[torch.randn(LARGE)])[0].result(LIMIT_S)
    until(lambda: not any("memfd" in name for name in links_of(os.getpid())), "the closing of each memfd")


def test_a_large_message_is_written_in_pieces(link, monkeypatch):
    monkeypatch.setattr(parcel, "MAX_WRITE_BYTES", 1000)
    sent = torch.randn(LARGE)
    assert torch.equal(link.ask(tensors=[sent])[1].result(LIMIT_S)[1][0], sent)


def test_no_memory_for_a_message_is_a_sentence_and_the_next_one_goes(link):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(PoolError, match=r"no memory for what it sends \(8000000 bytes.*File too large") as told:
            link.ask(tensors=[torch.randn(2_000_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.kind == "memory"
    assert link.ask("next")[0].result(LIMIT_S)[0] == "0:next"


def test_a_text_beyond_the_limit_is_refused_before_it_is_sent(link, monkeypatch):
    monkeypatch.setattr("comfy_xdit.pool.sockets.MAX_TEXT_BYTES", 10)
    with pytest.raises(PoolError, match="text of 11 bytes; the limit is 10"):
        link.ask("x" * 11)
    assert link.ask("y")[0].result(LIMIT_S)[0] == "0:y"


def test_what_is_not_on_the_cpu_in_one_piece_is_refused():
    for tensor in (torch.randn(4, 4).t(), torch.randn(3, device="meta"), torch.randn(3, 3).to_sparse()):
        with pytest.raises(ValueError, match="can't travel; send a contiguous one on cpu"):
            pack([tensor])


def memfd(num_bytes, seals):
    memory = Descriptor(os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(memory.fd, num_bytes)
    fcntl.fcntl(memory.fd, F_ADD_SEALS, seals)
    return memory


def plain_file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    return Descriptor(os.open(tmp_path / "file", os.O_RDONLY))


@pytest.mark.parametrize("lacking", [0x1, 0x2, 0x4, 0x8], ids=["seal", "shrink", "grow", "write"])
def test_memory_that_could_be_cut_or_written_to_is_refused(lacking):
    with pytest.raises(ValueError, match="isn't sealed"):
        unpack(Parcel(table=b'[["uint8", [4096]]]', num_bytes=4096, inline=b"", memory=memfd(4096, SEALS & ~lacking)))


def test_memory_of_another_size_and_files_are_refused(tmp_path):
    for memory, sentence in ((memfd(4095, SEALS), "of 4095 bytes, not 4096"), (plain_file(tmp_path), "no memfd")):
        with pytest.raises(ValueError, match=sentence):
            unpack(Parcel(table=b'[["uint8", [4096]]]', num_bytes=4096, inline=b"", memory=memory))


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"{",
        b"{}x",
        b"7",
        b"[7]",
        b'[["uint8"]]',
        b'[["uint8", [-1]]]',
        b'[["uint8", [true, 4]]]',
        b'[["uint8", [4.0]]]',
        b'[["uint8", 4]]',
        b'[["Tensor", [4]]]',
        b'[["nothing", [4]]]',
        b'[[["uint8"], [4]]]',
        b'[["uint8", [5]]]',
        b'[["uint8", [3]]]',
        b'[["float64", [4294967296, 4294967296]]]',
        b"[" * 100_000,
    ],
)
def test_tables_of_no_sense_are_refused(table):
    with pytest.raises(ValueError):
        unpack(Parcel(table=table, num_bytes=4, inline=bytes(4), memory=None))


def head(*, magic=MAGIC, has_memory=False, call=1, serial=0, table=2, text=0, num_bytes=0):
    return HEAD.pack(magic, has_memory, call, serial, table, text, num_bytes)


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4,
        os.urandom(4096),
        head(magic=b"none") + b"[]",
        head(text=MAX_TEXT_BYTES + 1),
        head(table=(1 << 32) - 1),
        head(num_bytes=INLINE_BYTES + 1),
        head(has_memory=True, num_bytes=4) + b"[]",
        head(call=99) + b"[]",
        head(table=4) + b"nope",
        head(text=1) + b"[]" + b"\xff",
        head()[:-1],
    ],
    ids=["http", "random", "magic", "text", "table", "inline", "no memfd", "unasked", "table", "utf-8", "half"],
)
def test_a_peer_that_talks_nonsense_fails_the_future_at_once(bare, junk):
    client, peer = bare
    [future] = client.send([0], 1, "", [])
    peer.sendall(junk)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        future.result(LIMIT_S)
    [after] = client.send([0], 2, "", [])
    with pytest.raises(ConnectionError):
        after.result(LIMIT_S)


def test_a_worker_lets_go_of_a_client_that_talks_nonsense(link):
    served = queue.SimpleQueue()
    with pairs(1) as ([client_end], [worker_end]):
        worker = SocketWorker(1, duplicate(worker_end), served.put)
        peer = client_end.dup()
    with peer:
        peer.sendall(b"x" * HEAD.size)
        assert peer.recv(1) == b""
    until(lambda: not worker.is_current, "the worker to be alone")
    assert served.empty()


def killed_child(body):
    """A forked child that runs `body`, then is killed by itself."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return pid


def test_a_worker_that_is_killed_fails_the_future_and_its_half_answer_is_dropped(bare):
    client, peer = bare
    futures = client.send([0], 1, "", [torch.randn(LARGE)]) + client.send([0], 2, "", [])
    child = killed_child(lambda: peer.sendall(head(text=1000) + b"[]" + b"half"))
    peer.close()
    os.waitpid(child, 0)
    for future in futures:
        with pytest.raises(ConnectionError, match="connection to worker 0 has ended"):
            future.result(LIMIT_S)
    assert not client.is_current


def test_a_client_that_is_killed_in_mid_message_is_dropped_with_it():
    served = queue.SimpleQueue()
    with pairs(1) as ([client_end], [worker_end]):
        worker = SocketWorker(1, duplicate(worker_end), served.put)
        peer = client_end.dup()
    whole = head(call=1, serial=1) + b"[]"
    child = killed_child(lambda: peer.sendall(whole + head(call=2, serial=2, text=1000) + b"[]" + b"half"))
    peer.close()
    os.waitpid(child, 0)
    until(lambda: not worker.is_current, "the worker to be alone")
    assert served.get().serial == 1 and served.empty()


def test_a_worker_waits_for_no_client_that_does_not_read():
    requests = queue.SimpleQueue()
    with pairs(1) as ([client_end], [worker_end]):
        worker = SocketWorker(1, duplicate(worker_end), requests.put)
        peer = client_end.dup()
    with peer:
        peer.sendall(head(serial=1) + b"[]")
        request = requests.get()
        # Far more than a socket takes; all of it on this thread, which would stand still.
        for _ in range(500):
            request.pack("", [torch.zeros(INLINE_BYTES // 4)])()
        worker.leave()
        until(lambda: not threads(), "the end of the threads")


def test_a_client_waits_for_no_worker_that_does_not_read(bare):
    client, _ = bare
    futures = [client.send([0], serial, "x" * 10_000, [])[0] for serial in range(1, 500)]
    client.leave()
    for future in futures:
        with pytest.raises(ConnectionError):
            future.result(LIMIT_S)
    until(lambda: not threads(), "the end of the threads")


def test_messages_come_in_the_order_in_which_they_were_sent():
    came = {0: [], 1: []}

    def serve(rank, request):
        came[rank].append(request.serial)
        request.pack("", [])()

    link = Link(2, serve)
    futures = [f for serial in range(1, 301) for f in link.ask(tensors=[torch.randn(serial * 100)], serial=serial)]
    for future in futures:
        future.result(LIMIT_S)
    link.close()
    assert came == {0: list(range(1, 301)), 1: list(range(1, 301))}


def test_a_message_aside_is_answered_while_another_one_runs():
    running = []

    def serve(rank, request):
        if request.serial == ASIDE:
            request.pack("aside", [])()
        else:
            running.append(request)

    link = Link(1, serve)
    [job] = link.ask("job")
    assert link.ask(serial=ASIDE)[0].result(LIMIT_S)[0] == "aside"
    assert not job.done()
    running[0].pack("done", [])()
    assert job.result(LIMIT_S)[0] == "done"
    link.close()


def test_a_forked_child_does_not_keep_the_connection(link):
    link.ask()[0].result(LIMIT_S)
    mine = {f"socket:[{inode}]" for inode in inodes(link)}
    assert len(mine) == 4 and mine <= set(links_of(os.getpid()))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"forked")
        signal.pause()
    try:
        assert os.read(read, 6) == b"forked"
        assert not mine & set(links_of(child))
        assert link.ask("still here")[0].result(LIMIT_S)[0] == "0:still here"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def inodes(link):
    channels = [*link.client._channels, *(worker._channel for worker in link.workers)]
    return [os.fstat(channel._sock.fileno()).st_ino for channel in channels]


def links_of(pid):
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue


def test_a_program_that_is_started_meanwhile_has_no_descriptor_of_ours(link):
    link.ask(tensors=[torch.randn(LARGE)])[0].result(LIMIT_S)
    # Not closed by who starts it, but by the kernel, which does so while it starts: the program says when it is there.
    command, pipe = [sys.executable, "-c", "print(flush=True); input()"], subprocess.PIPE
    with subprocess.Popen(command, close_fds=False, stdin=pipe, stdout=pipe) as program:
        program.stdout.readline()
        found = set(links_of(program.pid))
        program.communicate(b"\n")
    assert not {f"socket:[{inode}]" for inode in inodes(link)} & found
    assert not [name for name in found if "comfy-xdit" in name]


def test_descriptors_that_arrive_are_not_inherited():
    one, two = socket.socketpair()
    with one, two, open(os.devnull) as file:
        socket.send_fds(one, [b"x"], [file.fileno()])
        data, (came,) = receive(two, 1, 1)
        assert data == b"x" and not os.get_inheritable(came.fd)


def test_a_socket_of_another_kind_or_another_user_is_not_taken(monkeypatch):
    with socket.socket(socket.AF_INET) as other, pytest.raises(ValueError, match="no unix socket"):
        SocketWorker(1, Descriptor(other.detach()), print)
    one, two = socket.socketpair()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with one, pytest.raises(ValueError, match="of another user"):
        SocketWorker(1, Descriptor(two.detach()), print)


def test_the_sockets_of_an_order_that_nobody_took_are_closed():
    one, two = socket.socketpair()
    coordinator, pool = Wire(one), Pool("p", "cpu", False, {})
    pool._wire = Wire(two, takes_fds=True)
    before = descriptors()
    with pairs(2) as (client_ends, _):
        coordinator.send({"type": "waiting"})
        coordinator.send({"type": "join"}, [end.fileno() for end in client_ends])
    pool._unread = pool._wire.wait(LIMIT_S)
    assert [message["type"] for message in pool._unread] == ["waiting", "join"]
    assert len(descriptors() - before) == 2
    pool.close()
    coordinator.close()
    assert descriptors() < before


def test_credentials_are_read_as_the_kernel_writes_them():
    one, two = socket.socketpair()
    with one, two:
        raw = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        assert struct.unpack("3i", raw) == (os.getpid(), os.getuid(), os.getgid())
