"""A worker's connection to the pool's coordinator: its orders, its heartbeat, and its death pipe."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from comfy_xdit.pool.wire import Wire
from comfy_xdit.quoted import quoted

log = logging.getLogger("comfy_xdit")

BEAT_S = 1.0
MAX_REASON_CHARS = 2000


class CoordinatorClient:
    """Reads orders and beats on threads of its own, so that a long job on the main thread stops neither."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.measure: Callable[[], dict[str, Any]] = dict
        """What a beat reports; called on the beating thread, so it must not wait for a device."""
        self.on_order: Callable[[dict[str, Any]], None] | None = None
        """Takes an order, on the reading thread. None before "up": a worker is in no generation then, and the
        only order that can come is to leave one."""

    def start(self) -> None:
        """Begin to read and to beat."""
        for name, body in (("coordinator", self._read), ("heartbeat", self._beat)):
            threading.Thread(target=_for_life, args=(body,), name=name, daemon=True).start()

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message to the coordinator; a worker without a coordinator ends."""
        try:
            self._wire.send({"type": kind, **fields})
        except ConnectionError:
            os._exit(1)

    def failed(self, error: BaseException) -> None:
        """Say why this worker cannot start."""
        self.say("failed", message=f"{type(error).__name__}: {quoted(error)}"[:MAX_REASON_CHARS])

    def _read(self) -> None:
        while True:
            for order in self._wire.wait(60.0):
                if order.get("type") == "end":
                    # The pool was stopped: with this status torchrun ends too, and starts nobody anew.
                    os._exit(0)
                if self.on_order is not None:
                    self.on_order(order)

    def _beat(self) -> None:
        while True:
            self.say("beat", status=self.measure())
            time.sleep(BEAT_S)


def _for_life(body: Callable[[], None]) -> None:
    """Run what must go on as long as this process does, and end the process with it.

    Without the supervisor nobody would ever stop it, and one that only beats, or only reads, would pass for sound. The
    main thread may be stuck in a collective, so it is not asked.
    """
    try:
        body()
    except ConnectionError as error:
        log.info("the worker ends with its coordinator: %s", error)
    except Exception:
        log.exception("the worker ends, as it can't listen to its coordinator any more or report to it")
    finally:
        os._exit(1)


def host_memory() -> dict[str, Any]:
    """Bytes of RAM that this process holds, private and shared apart."""
    with open("/proc/self/statm") as statm:
        _, resident, shared, *_ = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in statm.read().split())
    return {"ram_bytes": resident, "ram_private_bytes": resident - shared}


def device_memory(device: str) -> dict[str, Any]:
    """Bytes of its device that this process holds, and the device's; {} for a CPU.

    For the main thread: the driver may let this call wait as long as a copy of another thread takes.
    """
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device_bytes": torch.cuda.memory_reserved(device),
        "device_free_bytes": free,
        "device_total_bytes": total,
    }
