"""A pool in this process: a real coordinator, and the workers' real loop on threads, so a test can turn its clocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from comfy_xdit_worker.loop import Loop
from played import hears, played_coordinator

from comfy_xdit.pool.client import Pool
from comfy_xdit.pool.coordinator import Coordinator
from comfy_xdit.pool.wire import Wire


class PlayedLink:
    """As `worker.coordinator_client.CoordinatorClient`, but an end of the connection is the end of this worker only."""

    def __init__(self, coordinator: Coordinator, rank: int, attempt: int) -> None:
        self.wire = Wire.connect(coordinator.folder.socket)
        self.wire.send({"type": "worker", "rank": rank, "attempt": attempt})
        assert hears(self.wire)
        self.said: list[dict[str, Any]] = []

    def say(self, kind: str, **fields: Any) -> None:
        self.said.append({"type": kind, **fields})
        with contextlib.suppress(ConnectionError):
            self.wire.send(self.said[-1])

    def read(self, loop: Loop) -> None:
        """Hand the coordinator's orders to `loop`, until the coordinator hangs up."""
        with contextlib.suppress(ConnectionError, ValueError):
            while True:
                for order in self.wire.wait(1.0):
                    loop.order(order)
                self.say("beat", status={})
        if loop._group is not None:
            loop._group.leave()


def add_workers(coordinator: Coordinator, services: list[Any], attempt: int = 0) -> list[PlayedLink]:
    """A worker for each service."""
    # The coordinator sees to it that it stays; these have no groups to make.
    coordinator.folder.ranks_store(attempt).touch()
    links = [PlayedLink(coordinator, rank, attempt) for rank in range(len(services))]
    for rank, (link, service) in enumerate(zip(links, services, strict=True)):
        loop = Loop(pool="test", rank=rank, world_size=len(services), service=service, coordinator=link)  # type: ignore[arg-type]
        threading.Thread(target=loop.run, daemon=True).start()
        threading.Thread(target=link.read, args=(loop,), daemon=True).start()
        link.say("up", environment={})
    return links


@contextlib.contextmanager
def played_pool(services: list[Any]) -> Iterator[tuple[Coordinator, list[PlayedLink], Pool]]:
    """Coordinator, workers and a client. Its pools' folder is the one of this moment's $COMFY_XDIT_HOME."""
    with played_coordinator(1, len(services)) as coordinator:
        # The workers are this process.
        coordinator.membership.kill = lambda: None  # type: ignore[method-assign]
        links = add_workers(coordinator, services)
        pool = Pool.connect("test", start=False)
        try:
            yield coordinator, links, pool
        finally:
            pool.close()
            for link in links:
                link.wire.close()
