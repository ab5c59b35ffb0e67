"""A worker's main loop: every message runs on the main thread, in the order that the client gave."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import queue
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from comfy_xdit.messages import Failure, LeaseEnded, Message, Result, decode, encode
from comfy_xdit.pool.network import LOOPBACK
from comfy_xdit.pool.transport import ASIDE, RPC, Group, Request, Serve

from .coordinator_client import CoordinatorClient
from .failures import classify

log = logging.getLogger("comfy_xdit")

STATUS_EVERY_S = 0.5
MAX_TRACE_CHARS = 20_000

Order = dict[str, Any]


class Service(Protocol):
    """What the loop needs of the class that `--service` names."""

    @property
    def has_communicated(self) -> bool: ...
    def handle(self, message: Message) -> Result: ...
    def aside(self, message: Message) -> Result: ...
    def abandon(self) -> None: ...
    def setup(self) -> list[Message]: ...
    def residents(self) -> list[Message]: ...
    def free_others(self) -> None: ...
    def forget_abandoned(self) -> None: ...
    def forget_client(self) -> None: ...
    def status(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class QueuedMessage:
    """A message of a client, on its way to the main thread."""

    generation: int
    request: Request

    def answer(self, message: Message) -> None:
        """Pack and send. Raises what packing raises."""
        self.request.pack(*encode(message))()


class Loop:
    """Runs a service's messages and the coordinator's orders."""

    def __init__(
        self,
        *,
        pool: str,
        rank: int,
        world_size: int,
        service: Service,
        coordinator: CoordinatorClient,
        interface: str = LOOPBACK,
        device_memory: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """interface: where this process listens for its client. device_memory: what the status tells of the device."""
        self._pool, self._rank, self._world_size = pool, rank, world_size
        self._interface = interface
        self._service, self._coordinator, self._device_memory = service, coordinator, device_memory
        self._inbox: queue.SimpleQueue[QueuedMessage | Order] = queue.SimpleQueue()
        self._group: Group | None = None
        # Written by the coordinator's thread, read by the others: generations up to this one are over.
        self._closed = 0
        self._reported: tuple[list[str], list[str]] = ([], [])
        self._snapshot: dict[str, Any] = {}
        self._snapshot_at = 0.0
        # Whether the service was given the message that runs: only then does it know what became of it.
        self._is_handled = False

    @property
    def snapshot(self) -> dict[str, Any]:
        """The service's last status; any thread may read it."""
        return self._snapshot

    def order(self, order: Order) -> None:
        """Take an order of the coordinator: "prepare", "leave" or "join" a generation. Any thread may call."""
        generation = int(order["generation"])
        if order["type"] == "leave":
            self._closed = max(self._closed, generation)
        elif order["type"] == "prepare":
            self._closed = max(self._closed, generation - 1)
        if order["type"] != "join":
            # The next client need not wait for the end of a job whose client is gone.
            self._service.abandon()
        self._inbox.put(order)

    def reload(self, residents: list[str]) -> None:
        """Make resident again what an earlier attempt of this worker held."""
        for text in residents:
            try:
                self._service.handle(decode(text, []))
            except Exception as error:
                # The file may be gone by now; the client that needs it will be told so.
                kind, sentence = classify(error, self._rank)
                trace = error if kind == "fault" else None
                log.warning("rank %d could not load again: %s", self._rank, sentence, exc_info=trace)
        self._report_residents()
        self._look()

    def run(self) -> None:
        """Never returns; the process ends with the coordinator."""
        while True:
            self._take()

    def _take(self) -> None:
        # A function of its own: what a message brought must not stay until the next one comes.
        try:
            item = self._inbox.get(timeout=STATUS_EVERY_S)
        except queue.Empty:
            self._service.forget_abandoned()
            self._report_residents()
            self._look()
            return
        if not isinstance(item, QueuedMessage):
            self._obey(item)
        elif item.generation <= self._closed:
            item.answer(self._dropped())
        else:
            self._run(item)

    # Orders

    def _obey(self, order: Order) -> None:
        kind, generation = order["type"], int(order["generation"])
        if kind == "join":
            self._join(generation, order)
            return
        self._leave()
        if kind == "prepare":
            self._coordinator.say("prepared", generation=generation)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None
        self._service.forget_client()

    def _join(self, generation: int, order: Order) -> None:
        try:
            self._group = self._make_group(generation, order, partial(self._accept, generation))
        except Exception as error:
            log.warning("rank %d could not join generation %d: %s", self._rank, generation, error)
            self._coordinator.say("join_failed", generation=generation)
            return
        self._coordinator.say("joined", generation=generation)

    def _make_group(self, generation: int, order: Order, handler: Serve) -> Group:
        if order["transport"] != RPC:
            from comfy_xdit.pool.sockets import SocketWorker

            return SocketWorker(generation, order["fds"][0], handler)
        from comfy_xdit.pool.rpc import RpcMember, RpcWorker

        member = RpcMember(
            pool=self._pool,
            generation=generation,
            store=order["store"],
            interface=self._interface,
            rank=self._rank + 1,
            num_processes=self._world_size + 1,
        )
        return RpcWorker(member, handler)

    def _dropped(self) -> Failure:
        return Failure(rank=self._rank, kind="lost", message="the client's lease is over")

    # Messages

    def _accept(self, generation: int, request: Request) -> None:
        """Runs on a thread of the transport."""
        job = QueuedMessage(generation, request)
        if generation <= self._closed:
            job.answer(self._dropped())
        elif request.serial == ASIDE:
            self._aside(request)
        else:
            self._inbox.put(job)

    def _aside(self, request: Request) -> None:
        """Answer beside the job that runs: the service must not touch what the main thread uses."""
        try:
            send = request.pack(*encode(self._service.aside(decode(request.text, request.tensors))))
        except Exception as error:
            kind, sentence = classify(error, self._rank)
            send = request.pack(*encode(Failure(rank=self._rank, kind=kind, message=sentence)))
        send()

    def _run(self, job: QueuedMessage) -> None:
        """Run a message, report its end to the coordinator, and answer.

        The answer is packed, with its copy from the device, before its end is reported: what fails there is a
        failure of the message like any other.
        """
        failure, self._is_handled = None, False
        try:
            send = self._handle(job.request)
        except Exception as error:
            failure = self._failure(error, has_communicated=self._is_handled and self._service.has_communicated)
            send = job.request.pack(*encode(failure))
        self._report_residents()
        # Before the answer: who acts on the answer must find that the coordinator knows of it. And in full: the
        # coordinator may end this process before the answer has left it.
        told = None if failure is None else dataclasses.asdict(failure)
        self._coordinator.say("done", generation=job.generation, serial=job.request.serial, failure=told)
        send()
        self._look(after_s=STATUS_EVERY_S)

    def _handle(self, request: Request) -> Callable[[], None]:
        """What sends the result. A function of its own, so that a failure can let go of all that it holds."""
        message = decode(request.text, request.tensors)
        self._coordinator.say("began", message=type(message).__name__)
        if isinstance(message, LeaseEnded):
            self._service.forget_client()
            return request.pack(*encode(Result()))
        self._is_handled = True
        return request.pack(*encode(self._service.handle(message)))

    def _failure(self, error: Exception, *, has_communicated: bool) -> Failure:
        trace = "".join(traceback.format_exception(error))[-MAX_TRACE_CHARS:]
        kind, sentence = classify(error, self._rank)
        log.warning("rank %d: %s", self._rank, sentence, exc_info=error if kind == "fault" else None)
        # Its frames hold the tensors that filled the device.
        traceback.clear_frames(error.__traceback__)
        if kind == "memory":
            del error
            gc.collect()
            self._service.free_others()
        return Failure(
            rank=self._rank, kind=kind, message=sentence, trace=trace, has_communicated=has_communicated
        )

    # Reports

    def _report_residents(self) -> None:
        told = self._service.setup(), self._service.residents()
        setup, residents = ([encode(message)[0] for message in messages] for messages in told)
        if (setup, residents) != self._reported:
            self._reported = setup, residents
            if self._rank == 0:
                self._coordinator.say("residents", setup=setup, messages=residents)

    def _look(self, after_s: float = 0.0) -> None:
        """Take the device's and the service's status, here because both belong to the main thread."""
        now = time.monotonic()
        if now - self._snapshot_at >= after_s:
            self._snapshot = {**self._device_memory(), **self._service.status()}
            self._snapshot_at = now


def guard(start: Callable[[], None], coordinator: CoordinatorClient) -> None:
    """Run `start`; when it raises, tell the coordinator and end with a status that makes the agent try again."""
    try:
        start()
    except BaseException as error:
        log.exception("the worker failed")
        coordinator.failed(error)
        os._exit(1)
