"""The process that is a pool: torch's elastic agent for the workers, and beside it the door.

Run as `python boot.py comfy_xdit.pool.supervisor …` by `start.py`. It detaches, holds the folder's "alive"
lock as long as it lives, and opens the door before it imports torch. For a pool on several machines there is no
agent here: the torchrun of each machine starts and restarts the workers, and this process hosts their stores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .door import Door
from .errors import PoolError
from .folder import PoolFolder, pool_folder
from .network import Network

log = logging.getLogger("comfy_xdit")

MONITOR_INTERVAL_S = 0.1
PARTING_LIMIT_S = 5.0
"""How long the end waits for the workers of other machines to end first."""


def main() -> None:
    """Detach, open the door, and run workers until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--devices", required=True, help="JSON list, one device per rank")
    parser.add_argument("--service", required=True)
    parser.add_argument("--path", action="append", default=[], help="folder for the workers' sys.path")
    parser.add_argument("--network", help="JSON of the `Network` between several machines")
    parser.add_argument("--ready-fd", type=int, required=True)
    args = parser.parse_args()
    # The starter waits for this first process only: the pool is nobody's child but init's.
    if os.fork():
        os._exit(0)
    with open(args.ready_fd, "w") as ready:
        folder = pool_folder(args.name)
        with folder.try_lock("alive") as free:
            if free:
                network = Network(**json.loads(args.network)) if args.network else None
                _Supervisor(folder, json.loads(args.devices), network, args.service, args.path).run(ready)


class _Supervisor:
    def __init__(
        self, folder: PoolFolder, devices: list[str], network: Network | None, service: str, path: list[str]
    ) -> None:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
        )
        self.folder, self.devices, self.service, self.path = folder, devices, service, path
        self.agent: Any = None
        folder.clear()
        try:
            self.door = Door(folder, devices, network=network, stop=self.stop, kill_starting=self.kill_workers)
        except PoolError as error:
            # The last line of the log is what the starter tells. It reads it when `ready` is closed, by our end.
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(1)

    def run(self, ready: Any) -> None:
        """Serve until `stop`, or a SIGTERM from elsewhere; ends this process."""
        if self.door.network is not None:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))
        threading.Thread(target=self._run_door, name="door", daemon=True).start()
        ready.write("ready\n")
        ready.close()
        try:
            if self.door.network is None:
                self._run_agent()
            else:
                while True:
                    signal.pause()
        except BaseException as error:
            # Also elastic's SignalException, which is how a stop arrives here.
            log.info("ending: %r", error)
        self.kill_workers()
        if self.door.network is not None:
            self._part()
        self.folder.clear()
        os._exit(0)

    def _part(self) -> None:
        """Have the workers of other machines end of themselves: their torchruns would start killed ones anew."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.door.dismiss()
        deadline = time.monotonic() + PARTING_LIMIT_S
        while self.door.has_workers and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        """End the workers and this process; called on the door's thread."""
        self.kill_workers()
        os.kill(os.getpid(), signal.SIGTERM)

    def kill_workers(self) -> None:
        """SIGKILL to all processes of the agent's present attempt."""
        workers = [] if self.agent is None else self.agent.get_worker_group().workers
        for worker in workers:
            if isinstance(worker.id, int):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.id, signal.SIGKILL)

    def _run_door(self) -> None:
        try:
            self.door.run()
        except BaseException:
            # Without a door nobody can reach or stop the pool.
            log.exception("the door failed")
            self.stop()

    def _run_agent(self) -> None:
        # What listens at all listens on loopback; the workers inherit this.
        os.environ.update(
            dict.fromkeys(("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
        )
        # A client that leaves is no news: TensorPipe warns of every connection that ends.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from .agent import make_agent

        self.agent = make_agent(
            folder=self.folder,
            num_workers=len(self.devices),
            arguments=self._worker_arguments(),
            pause_s=lambda: self.door.pause_s,
            monitor_interval_s=MONITOR_INTERVAL_S,
        )
        self.agent.run()

    def _worker_arguments(self) -> list[str]:
        boot = Path(__file__).resolve().parent.parent / "boot.py"
        arguments = [
            str(boot),
            "comfy_xdit_worker",
            "--door",
            str(self.folder.door),
            "--service",
            self.service,
        ]
        for entry in self.path:
            arguments += ["--path", entry]
        return arguments


if __name__ == "__main__":
    main()
