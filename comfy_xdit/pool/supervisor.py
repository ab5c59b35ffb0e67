"""The process that is a pool: torch's elastic agent for the workers, and beside it the coordinator.

Run as `python boot.py comfy_xdit.pool.supervisor …` by `start.py`. It detaches, holds the folder's "alive"
lock as long as it lives, and opens the coordinator before it imports torch. For a pool on several machines there is no
agent here: the torchrun of each machine starts and restarts the workers, and this process hosts their stores.
"""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import os
import signal
import sys
import threading
import time
from typing import Any

from comfy_xdit.mount import BOOT

from .coordinator import Coordinator
from .environment import hidden, settle
from .errors import PoolError
from .folder import PoolFolder, pool_folder
from .locks import Lock
from .network import LOOPBACK, Network
from .transport import RPC, SOCKETS

log = logging.getLogger("comfy_xdit")

MONITOR_INTERVAL_S = 0.1
PARTING_LIMIT_S = 5.0
"""How long the end waits for the workers of other machines to end first."""


def main() -> None:
    """Detach, open the coordinator, and run workers until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--devices", required=True, help="JSON list, one device per rank")
    parser.add_argument("--service", required=True)
    parser.add_argument("--path", action="append", default=[], help="folder for the workers' sys.path")
    parser.add_argument("--network", help="JSON of the `Network` between several machines")
    parser.add_argument("--transport", choices=(SOCKETS, RPC), required=True, help="between client and workers")
    parser.add_argument("--ready-fd", type=int, required=True)
    args = parser.parse_args()
    # The starter waits for this first process only: the pool is nobody's child but init's.
    if os.fork():
        os._exit(0)
    with open(args.ready_fd, "w") as ready:
        try:
            folder = pool_folder(args.name)
            lock = folder.lock("alive")
            if not lock.take():
                raise PoolError(f"another pool {args.name!r} runs, or is just ending; run again")
            network = Network(**json.loads(args.network)) if args.network else None
            devices = json.loads(args.devices)
            supervisor = _Supervisor(folder, lock, devices, network, args.transport, args.service, args.path)
        except (PoolError, OSError) as error:
            # Not by the log: it may be another pool's, or on a full disk.
            why = error.strerror if isinstance(error, OSError) else None  # Without the path, which str(error) names.
            ready.write(f"{why or error}\n")
            sys.exit(1)
        supervisor.run(ready)


def kill_child(pid: int) -> None:
    """SIGKILL to a process that this one started; to nobody when it has ended and was waited for.

    The agent keeps the numbers of an attempt until the next one begins, and by then they may be other processes'.
    """
    try:
        # Not waited for: the agent's own waiting is to find it.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        os.kill(pid, signal.SIGKILL)
    except (ChildProcessError, ProcessLookupError):
        return


class _Supervisor:
    def __init__(
        self,
        folder: PoolFolder,
        lock: Lock,
        devices: list[str],
        network: Network | None,
        transport: str,
        service: str,
        path: list[str],
    ) -> None:
        """lock: the folder's "alive", taken. Raises PoolError when the coordinator can't be opened."""
        # Nobody else writes there now, so what an earlier pool said can go.
        os.truncate(folder.log, 0)
        # Followed to where the folder is made anew, should somebody delete it.
        handler = logging.handlers.WatchedFileHandler(folder.log)
        logging.basicConfig(
            handlers=[handler], level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
        )
        # The workers inherit it.
        changes = settle(os.environ, interface=LOOPBACK, nccl_interface=LOOPBACK)
        for said in filter(None, (str(changes), hidden(os.environ))):
            log.warning("%s", said)
        self.folder, self.devices, self.service, self.path = folder, devices, service, path
        self._lock = lock
        self.agent: Any = None
        folder.clear()
        self.coordinator = Coordinator(
            folder,
            devices,
            lock=lock,
            network=network,
            transport=transport,
            stop=self.stop,
            kill_starting=self.kill_workers,
        )
        self.coordinator.changes = changes

    def run(self, ready: Any) -> None:
        """Serve until `stop`, or a SIGTERM from elsewhere; ends this process."""
        if self.coordinator.network is not None:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))
        threading.Thread(target=self._run_coordinator, name="coordinator", daemon=True).start()
        ready.write("ready\n")
        ready.close()
        try:
            if self.coordinator.network is None:
                self._run_agent()
            else:
                while True:
                    signal.pause()
        except BaseException as error:
            # Also elastic's SignalException, which is how a stop arrives here.
            log.info("ending: %r", error)
        self.kill_workers()
        if self.coordinator.network is not None:
            self._part()
        if self._lock.is_in_place:
            self.folder.clear()
        os._exit(0)

    def _part(self) -> None:
        """Have the workers of other machines end of themselves: their torchruns would start killed ones anew."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.coordinator.dismiss()
        deadline = time.monotonic() + PARTING_LIMIT_S
        while self.coordinator.has_workers and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        """End the workers and this process; called on the coordinator's thread."""
        self.kill_workers()
        os.kill(os.getpid(), signal.SIGTERM)

    def kill_workers(self) -> None:
        """SIGKILL to all processes of the agent's present attempt."""
        workers = [] if self.agent is None else self.agent.get_worker_group().workers
        for worker in workers:
            if isinstance(worker.id, int):
                kill_child(worker.id)

    def _run_coordinator(self) -> None:
        try:
            self.coordinator.run()
        except BaseException:
            # Without a coordinator nobody can reach or stop the pool.
            log.exception("the coordinator failed")
            self.stop()

    def _run_agent(self) -> None:
        # A client that leaves is no news: TensorPipe warns of every connection that ends.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from .agent import make_agent

        self.agent = make_agent(
            folder=self.folder,
            num_workers=len(self.devices),
            arguments=self._worker_arguments(),
            wait=self._wait_for_attempt,
            monitor_interval_s=MONITOR_INTERVAL_S,
        )
        self.agent.run()

    def _wait_for_attempt(self) -> None:
        time.sleep(self.coordinator.pace.pause_s)
        while self.coordinator.starts.held:
            time.sleep(MONITOR_INTERVAL_S)
        self.coordinator.pace.began()

    def _worker_arguments(self) -> list[str]:
        arguments = [
            str(BOOT),
            "comfy_xdit_worker",
            "--coordinator",
            str(self.folder.socket),
            "--service",
            self.service,
        ]
        for entry in self.path:
            arguments += ["--path", entry]
        return arguments


if __name__ == "__main__":
    main()
