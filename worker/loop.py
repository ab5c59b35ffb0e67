"""A worker's main loop: every message runs on the main thread, in the order that the client gave."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from comfy_xdit.messages import Failure, Message, Result, decode, encode
from comfy_xdit.pool.network import LOOPBACK
from comfy_xdit.pool.rpc import ASIDE, Group, Place, TurnEnded

from .failures import classify
from .link import Link

log = logging.getLogger("comfy_xdit")

STATUS_EVERY_S = 0.5
MAX_TRACE_CHARS = 20_000

Order = dict[str, Any]


class Service(Protocol):
    """What the loop needs of the class that `--service` names."""

    def handle(self, message: Message) -> Result: ...
    def aside(self, message: Message) -> Result: ...
    def abandon(self) -> None: ...
    def residents(self) -> list[Message]: ...
    def forget_client(self) -> None: ...
    def status(self) -> dict[str, Any]: ...


class Job:
    """A message of a client, on its way from an RPC thread to the main thread and back."""

    def __init__(self, generation: int, serial: int, text: str, tensors: list[Tensor]) -> None:
        self.generation, self.serial, self.text, self.tensors = generation, serial, text, tensors
        self.answer: tuple[str, list[Tensor]] | None = None
        self.done = threading.Event()

    def resolve(self, answer: Message) -> None:
        self.answer = encode(answer)
        self.done.set()


class Loop:
    """Runs a service's messages and the door's orders."""

    def __init__(
        self,
        *,
        pool: str,
        rank: int,
        world_size: int,
        service: Service,
        link: Link,
        interface: str = LOOPBACK,
        device_memory: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """interface: where this process listens for its client. device_memory: what the status tells of the device."""
        self._pool, self._rank, self._world_size = pool, rank, world_size
        self._interface = interface
        self._service, self._link, self._device_memory = service, link, device_memory
        self._inbox: queue.SimpleQueue[Job | Order] = queue.SimpleQueue()
        self._early: dict[int, Job] = {}
        self._group: Group | None = None
        # Written by the link's thread, read by the others: generations up to this one are over.
        self._closed = 0
        self._serial = 0
        self._residents: list[str] = []
        self._snapshot: dict[str, Any] = {}
        self._snapshot_at = 0.0

    @property
    def snapshot(self) -> dict[str, Any]:
        """The service's last status; any thread may read it."""
        return self._snapshot

    def order(self, order: Order) -> None:
        """Take an order of the door: "prepare", "leave" or "join" a generation. Any thread may call."""
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
            except Exception:
                # The file may be gone by now; the client that needs it will be told so.
                log.exception("rank %d could not load again %s", self._rank, text)
        self._report_residents()
        self._look()

    def run(self) -> None:
        """Never returns; the process ends with the link."""
        while True:
            try:
                item = self._inbox.get(timeout=STATUS_EVERY_S)
            except queue.Empty:
                self._look()
                continue
            if not isinstance(item, Job):
                self._obey(item)
            elif item.generation <= self._closed:
                # Not kept: a new client's message of the same number would find its place taken.
                item.resolve(self._dropped())
            else:
                self._early[item.serial] = item
                self._run_in_order()

    # Orders

    def _obey(self, order: Order) -> None:
        kind, generation = order["type"], int(order["generation"])
        if kind == "join":
            self._join(generation, order["store"])
            return
        self._leave()
        if kind == "prepare":
            self._link.say("prepared", generation=generation)

    def _leave(self) -> None:
        # Every waiting RPC thread first: leaving the group joins them.
        for job in self._early.values():
            job.resolve(self._dropped())
        self._early.clear()
        if self._group is not None:
            self._group.leave()
            self._group = None
        self._service.forget_client()

    def _join(self, generation: int, store: str) -> None:
        place = Place(
            pool=self._pool,
            generation=generation,
            store=store,
            interface=self._interface,
            rank=self._rank + 1,
            num_processes=self._world_size + 1,
        )
        self._serial = 0
        try:
            self._group = Group.join(place, partial(self._accept, generation))
        except Exception as error:
            log.warning("rank %d could not join generation %d: %s", self._rank, generation, error)
            self._link.say("join_failed", generation=generation)
            return
        self._link.say("joined", generation=generation)

    def _dropped(self) -> Failure:
        return Failure(rank=self._rank, kind="lost", message="the client's turn is over")

    # Messages

    def _accept(
        self, generation: int, serial: int, text: str, tensors: list[Tensor]
    ) -> tuple[str, list[Tensor]]:
        """Runs on an RPC thread: what the peer sent is not yet trusted."""
        sound = type(serial) is int and isinstance(text, str) and isinstance(tensors, list)
        if not sound:
            refusal = "malformed message: wrong argument types"
            return encode(Failure(rank=self._rank, kind="input", message=refusal))
        if generation <= self._closed:
            return encode(self._dropped())
        if serial == ASIDE:
            return encode(self._aside(text, tensors))
        job = Job(generation, serial, text, tensors)
        self._inbox.put(job)
        if generation <= self._closed:
            # The turn ended meanwhile, and the main thread may wait for this one to return.
            job.resolve(self._dropped())
        job.done.wait()
        assert job.answer is not None
        return job.answer

    def _aside(self, text: str, tensors: list[Tensor]) -> Message:
        """Beside the job that runs, on an RPC thread: the service must not touch what the main thread uses."""
        try:
            return self._service.aside(decode(text, tensors))
        except Exception as error:
            kind, sentence = classify(error, self._rank)
            return Failure(rank=self._rank, kind=kind, message=sentence)

    def _run_in_order(self) -> None:
        # RPC threads may hand over two messages the wrong way round, on one rank and not on another;
        # their collectives would then meet each other's.
        while (job := self._early.pop(self._serial + 1, None)) is not None:
            self._serial += 1
            if job.generation <= self._closed:
                job.resolve(self._dropped())
            else:
                self._run(job)

    def _run(self, job: Job) -> None:
        kind, answer = "unreadable", None
        try:
            message = decode(job.text, job.tensors)
            kind = type(message).__name__
            self._link.say("began", message=kind)
            if isinstance(message, TurnEnded):
                self._service.forget_client()
                answer = Result()
            else:
                answer = self._service.handle(message)
        except Exception as error:
            answer = self._failure(error)
        self._report_residents()
        # Before the answer: who acts on the answer must find that the door knows of it. And in full: the
        # door may end this process before the answer has left it.
        failure = dataclasses.asdict(answer) if isinstance(answer, Failure) else None
        self._link.say("done", generation=job.generation, serial=job.serial, failure=failure)
        job.resolve(answer)
        self._look(after_s=STATUS_EVERY_S)

    def _failure(self, error: Exception) -> Failure:
        trace = "".join(traceback.format_exception(error))[-MAX_TRACE_CHARS:]
        kind, sentence = classify(error, self._rank)
        log.warning("rank %d: %s", self._rank, sentence, exc_info=error if kind == "fault" else None)
        # Its frames hold the tensors that filled the device.
        traceback.clear_frames(error.__traceback__)
        if kind == "memory":
            del error
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        return Failure(rank=self._rank, kind=kind, message=sentence, trace=trace)

    # Reports

    def _report_residents(self) -> None:
        residents = [encode(message)[0] for message in self._service.residents()]
        if residents != self._residents:
            self._residents = residents
            if self._rank == 0:
                self._link.say("residents", messages=residents)

    def _look(self, after_s: float = 0.0) -> None:
        """Take the device's and the service's status, here because both belong to the main thread."""
        now = time.monotonic()
        if now - self._snapshot_at >= after_s:
            self._snapshot = {**self._device_memory(), **self._service.status()}
            self._snapshot_at = now


def guard(start: Callable[[], None], link: Link) -> None:
    """Run `start`; when it raises, tell the door and end with a status that makes the agent try again."""
    try:
        start()
    except BaseException as error:
        log.exception("the worker failed")
        link.failed(error)
        os._exit(1)
