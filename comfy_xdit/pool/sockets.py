"""The transport of a pool on one machine: a pair of unix sockets between the client and each worker.

Nothing listens. The coordinator, which has asked the kernel for each visitor's user id, makes the pairs for every
generation and passes their ends on. Each end has two threads that sleep in the kernel: one reads, one writes, so
that nobody who sends waits for a peer that doesn't read.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from ..errors import InputError
from .descriptor import Descriptor, receive
from .errors import PoolError
from .forks import close_in_children
from .parcel import INLINE_BYTES, Parcel, pack, unpack
from .transport import Answer, ClientGroup, Poll, Request, Serve

log = logging.getLogger("comfy_xdit")

MAGIC = b"cxd1"
HEAD = struct.Struct("<4s?QQIQQ")
"""Of a frame: magic, whether a memfd comes with it, number of the call, serial number, then the bytes of the table of
tensors, of the text and of the tensors. Table, text and inline tensors follow."""

MAX_TABLE_BYTES, MAX_TEXT_BYTES = 1 << 26, 1 << 28

PEER_CREDENTIALS = struct.Struct("3i")


@dataclasses.dataclass(frozen=True)
class Frame:
    """A message or an answer: call is the same in both. serial: of a message; an answer's is 0."""

    call: int
    serial: int
    text: bytes
    parcel: Parcel


class Channel:
    """One end of a pair of sockets."""

    def __init__(self, end: Descriptor, read: Callable[[Frame], None], ended: Callable[[str], None]) -> None:
        """Takes over `end`. read: is given each frame, and ended, once, the reason of the end: both on the reading
        thread. Raises OSError or ValueError for what is no socket of this user's.
        """
        self._sock = socket.socket(fileno=end.fd)
        end.release()
        close_in_children(self._sock)
        self._sock.setblocking(True)
        _check_peer(self._sock)
        self._on_frame, self._on_end = read, ended
        self._outbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="comfy-xdit-write", daemon=True)

    def start(self) -> None:
        """Begin to read and to write."""
        self._writer.start()
        threading.Thread(target=self._read_all, name="comfy-xdit-read", daemon=True).start()

    def put(self, frame: Frame) -> None:
        """Send it when the peer reads; dropped when the connection ends before."""
        self._outbox.put(frame)

    def close(self) -> None:
        """End the connection at once; the threads do the rest. May be called again."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The peer, or a closing before this one, was faster.
            return

    def _read_all(self) -> None:
        reason = "the other end closed"
        try:
            while self._pass_on():
                pass
        except Exception as error:
            # Whatever it is, those who wait for an answer must learn of it.
            reason = f"{type(error).__name__}: {error}"
            log.warning("a connection between client and worker broke: %s", reason)
        self.close()
        self._on_end(reason)
        self._outbox.put(None)
        self._writer.join()
        self._sock.close()

    def _pass_on(self) -> bool:
        """One frame; False at the end. A function, so that no frame's memory is held while the next is awaited."""
        frame = self._read()
        if frame is not None:
            self._on_frame(frame)
        return frame is not None

    def _read(self) -> Frame | None:
        """The next frame; None at an end, also within a frame: a peer that was killed leaves half of one."""
        head, descriptors = self._exactly(HEAD.size)
        if head is None:
            return None
        magic, has_memory, call, serial, num_table, num_text, num_bytes = HEAD.unpack(head)
        num_inline = 0 if has_memory else num_bytes
        if magic != MAGIC or num_table > MAX_TABLE_BYTES or num_text > MAX_TEXT_BYTES or num_inline > INLINE_BYTES:
            raise ValueError("what came is no message of a pool")
        if len(descriptors) != has_memory:
            # The kernel drops those for which this process has no room.
            raise ValueError(f"{len(descriptors)} descriptors came with a message; perhaps too many files are open")
        body, more = self._exactly(num_table + num_text + num_inline)
        if body is None or more:
            return None
        table, text, inline = body[:num_table], body[num_table : num_table + num_text], body[num_table + num_text :]
        memory = descriptors[0] if descriptors else None
        parcel = Parcel(table=bytes(table), num_bytes=num_bytes, inline=bytes(inline), memory=memory)
        return Frame(call, serial, bytes(text), parcel)

    def _exactly(self, num_bytes: int) -> tuple[memoryview | None, list[Descriptor]]:
        """So many bytes and the descriptors that came with them; None for the bytes at an end."""
        data, filled = memoryview(bytearray(num_bytes)), 0
        descriptors: list[Descriptor] = []
        while filled < num_bytes:
            # As much as is asked for, so that no descriptor of the next frame comes along.
            try:
                part, fds = receive(self._sock, num_bytes - filled, 1)
            except ConnectionError:
                return None, descriptors
            descriptors += fds
            if not part:
                return None, descriptors
            data[filled : filled + len(part)] = part
            filled += len(part)
        return data, descriptors

    def _write_all(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        frame = self._outbox.get()
        try:
            if frame is not None:
                self._write(frame)
        except OSError:
            # The reading thread learns of the end, and puts the None that ends this one.
            self.close()
        return frame is not None

    def _write(self, frame: Frame) -> None:
        parcel = frame.parcel
        has_memory = parcel.memory is not None
        head = HEAD.pack(
            MAGIC, has_memory, frame.call, frame.serial, len(parcel.table), len(frame.text), parcel.num_bytes
        )
        data = memoryview(b"".join((head, parcel.table, frame.text, parcel.inline)))
        fds = [parcel.memory.fd] if parcel.memory is not None else []
        sent = socket.send_fds(self._sock, [data], fds)
        self._sock.sendall(data[sent:])


def _raw(whose: str, text: str) -> bytes:
    """A text as it travels. Raises InputError for one that the other end would take for no message."""
    raw = text.encode()
    if len(raw) > MAX_TEXT_BYTES:
        raise InputError(f"{whose} text of {len(raw)} bytes; the limit is {MAX_TEXT_BYTES}, so ask for less at once")
    return raw


def _check_peer(sock: socket.socket) -> None:
    """Raises ValueError when it is no unix socket, or not made by a process of this user."""
    if sock.family != socket.AF_UNIX:
        raise ValueError("what was passed is no unix socket")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    if PEER_CREDENTIALS.unpack(raw)[1] != os.getuid():
        raise ValueError("what was passed is a socket of another user")


class SocketClient:
    """A client's connections to all workers of a generation."""

    def __init__(self, generation: int, ends: Sequence[Descriptor]) -> None:
        """ends: of the sockets, a rank's each; they are taken over."""
        self.generation = generation
        self._calls = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: list[dict[int, Future[Answer]]] = [{} for _ in ends]
        self._lost: set[int] = set()
        self._channels = [self._channel(rank, end) for rank, end in enumerate(ends)]
        for channel in self._channels:
            channel.start()

    def _channel(self, rank: int, end: Descriptor) -> Channel:
        return Channel(end, lambda frame: self._answered(rank, frame), lambda reason: self._ended(rank, reason))

    @property
    def is_current(self) -> bool:
        return not self._lost

    def send(self, ranks: Sequence[int], serial: int, text: str, tensors: list[Tensor]) -> list[Future[Answer]]:
        try:
            raw = _raw("a message's", text)
        except InputError as error:
            raise PoolError(str(error), kind="input") from None
        try:
            # Once, whatever the number of ranks: they share its memory.
            parcel = pack(tensors)
        except MemoryError as error:
            raise PoolError(f"this process has no memory for what it sends ({error})", kind="memory") from None
        return [self._send(rank, Frame(next(self._calls), serial, raw, parcel)) for rank in ranks]

    def _send(self, rank: int, frame: Frame) -> Future[Answer]:
        future: Future[Answer] = Future()
        # A running one can't be cancelled, so it can be resolved in one way only.
        future.set_running_or_notify_cancel()
        with self._lock:
            if rank not in self._lost:
                self._waiting[rank][frame.call] = future
                self._channels[rank].put(frame)
                return future
        future.set_exception(ConnectionError(f"the connection to worker {rank} has ended"))
        return future

    def _answered(self, rank: int, frame: Frame) -> None:
        with self._lock:
            future = self._waiting[rank].pop(frame.call, None)
        if future is None:
            raise ValueError("an answer to nothing that was asked")
        try:
            future.set_result((frame.text.decode(), unpack(frame.parcel)))
        except Exception as error:
            future.set_exception(ConnectionError(f"the answer can't be read: {type(error).__name__}: {error}"))

    def _ended(self, rank: int, reason: str) -> None:
        with self._lock:
            self._lost.add(rank)
            left, self._waiting[rank] = self._waiting[rank], {}
        for future in left.values():
            future.set_exception(ConnectionError(f"the connection to worker {rank} has ended: {reason}"))

    def leave(self) -> None:
        with self._lock:
            self._lost.update(range(len(self._channels)))
        for channel in self._channels:
            channel.close()


class SocketWorker:
    """A worker's connection to the client of a generation; `handler` is given what comes."""

    def __init__(self, generation: int, end: Descriptor, handler: Serve) -> None:
        self.generation = generation
        self._is_over = False
        self._handler = handler
        self._channel = Channel(end, self._requested, self._ended)
        self._channel.start()

    @property
    def is_current(self) -> bool:
        return not self._is_over

    def _requested(self, frame: Frame) -> None:
        def pack_answer(text: str, tensors: list[Tensor]) -> Callable[[], None]:
            answer = Frame(frame.call, 0, _raw("an answer's", text), pack(tensors))
            return lambda: self._channel.put(answer)

        self._handler(Request(frame.serial, frame.text.decode(), unpack(frame.parcel), pack_answer))

    def _ended(self, reason: str) -> None:
        self._is_over = True

    def leave(self) -> None:
        self._is_over = True
        self._channel.close()


class SocketJoiner:
    """Nothing to wait for: the coordinator passes sockets that are connected."""

    def check(self, interface: str) -> None:
        return None

    def join(self, pool: str, order: dict[str, Any], num_ranks: int, joined: Callable[[ClientGroup], None]) -> None:
        joined(SocketClient(order["generation"], order["fds"]))

    def settle(self, poll: Poll) -> None:
        return None
