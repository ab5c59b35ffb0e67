"""torch.distributed.elastic's agent, set up for one machine and without a port.

The agent starts the workers as a group and starts all of them again when one ends. Its own rendezvous
back ends open a TCPStore on all interfaces, so it gets a handler that keeps what it needs in its own memory.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from .folder import PoolFolder

NO_LIMIT = 1 << 30


class LoneRendezvous(RendezvousHandler):
    """A rendezvous of this machine alone."""

    def __init__(self, folder: PoolFolder, wait: Callable[[], None]) -> None:
        self._folder, self._wait = folder, wait
        self._attempt = -1

    def get_backend(self) -> str:
        return "lone"

    @property
    def use_agent_store(self) -> bool:
        # Else the workers would be told to reach a TCPStore.
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Called before every start of the group: the place for a pause between failing starts."""
        self._wait()
        self._attempt += 1
        self._folder.ranks_store(self._attempt - 1).unlink(missing_ok=True)
        nowhere = RendezvousStoreInfo(master_addr="127.0.0.1", master_port=0)
        return RendezvousInfo(dist.HashStore(), 0, 1, nowhere)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._folder.name

    def shutdown(self) -> bool:
        return True


class _InheritedStreams(DefaultLogsSpecs):
    """Workers write to the supervisor's log; no threads that follow files of their own."""

    def __init__(self) -> None:
        super().__init__(log_dir=os.devnull)

    def reify(self, envs: dict[int, dict[str, str]]) -> Any:
        return dataclasses.replace(super().reify(envs), tee_stdouts={}, tee_stderrs={})


def make_agent(
    *,
    folder: PoolFolder,
    num_workers: int,
    arguments: list[str],
    wait: Callable[[], None],
    monitor_interval_s: float,
) -> LocalElasticAgent:
    """An agent whose `run()` keeps `num_workers` processes `python *arguments` alive, without limit.

    wait: returns when the next attempt may begin.
    Must run on the main thread: workers end with the thread that started them (PDEATHSIG).
    """
    spec = WorkerSpec(
        role="worker",
        local_world_size=num_workers,
        entrypoint=sys.executable,
        args=tuple(arguments),
        rdzv_handler=LoneRendezvous(folder, wait),
        max_restarts=NO_LIMIT,
        monitor_interval=monitor_interval_s,
    )
    return LocalElasticAgent(spec, logs_specs=_InheritedStreams(), start_method="spawn")
