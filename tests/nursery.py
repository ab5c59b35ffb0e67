"""A process that has imported everything, and forks the tests' ranks: an import takes seconds, a fork next to nothing.

Also run as that process' own script.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

Ends = list[tuple[int, int]]
"""For each rank the descriptors that it reads jobs from, and writes answers to."""


@functools.cache
def nursery() -> Nursery:
    """This process' one; it ends with the process."""
    return Nursery()


class Nursery:
    """The other side of a socket: requests and answers as JSON, one at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(number)], pass_fds=[number], env=environment
            )
        atexit.register(self._close)

    def fork(self, store: str, ends: Ends) -> list[int]:
        """The ids of as many ranks as there are ends, which meet at the file `store`."""
        return self._ask({"store": store}, [end for pair in ends for end in pair])

    def end(self, processes: list[int]) -> None:
        """Kill ranks, and wait until they are gone."""
        self._ask({"end": processes})

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()

    def _ask(self, request: dict, descriptors: list[int] | None = None) -> list[int]:
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors or [])
        answer = self._socket.recv(1 << 16)
        assert answer, "the process that forks ranks is gone"
        return json.loads(answer)


def main(number: int) -> None:
    root = Path(__file__).resolve().parent.parent
    runpy.run_path(str(root / "comfy_xdit" / "mount.py"))["mount"]("comfy_xdit")
    import ranks
    import torch.distributed.device_mesh

    from comfy_xdit.models import FAMILIES

    torch.set_num_threads(1)
    for family in FAMILIES.values():
        family.model_class()
    gc.freeze()  # what is there lives as long as the ranks do: not to be looked at in each of them
    alive: list[int] = []
    with socket.socket(fileno=number) as asked:
        while True:
            text, descriptors, *_ = socket.recv_fds(asked, 1 << 16, 256)
            if not text:
                break
            request = json.loads(text)
            if "end" in request:
                end(request["end"])
                alive = [process for process in alive if process not in request["end"]]
                asked.send(b"[]")
                continue
            ends = list(zip(descriptors[::2], descriptors[1::2], strict=True))
            forked = []
            for rank, own in enumerate(ends):
                process = os.fork()
                if process == 0:
                    asked.close()
                    close(end for pair in ends if pair is not own for end in pair)
                    ranks.serve(rank, len(ends), request["store"], *own)
                    os._exit(0)
                forked.append(process)
            alive += forked
            close(descriptors)
            asked.send(json.dumps(forked).encode())
    end(alive)


def end(processes) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


def close(descriptors) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]))
