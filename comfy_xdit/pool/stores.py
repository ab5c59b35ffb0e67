"""Where the processes of a group find each other: a file on one machine, a store of the supervisor's on several.

A store goes over the wire as its URL: "file:///…", or "comfy-xdit://host:port/prefix" for the keys with that prefix in
a TCPStore. torch's own URL for a TCPStore can't name a prefix, and would have the first rank listen on all interfaces.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from .folder import PoolFolder, unwritable

if TYPE_CHECKING:
    from torch.distributed import Store

SCHEME = "comfy-xdit"

CONNECT_TIMEOUT_S = 30.0

ROOM_BYTES = 64 * 2**10
"""More than the ranks of a machine write into a file store."""


class FileStores:
    """A file of the pool's folder for each group; nothing listens."""

    def __init__(self, folder: PoolFolder) -> None:
        self._folder = folder

    def for_ranks(self, attempt: int) -> str:
        """Of the ranks of an attempt, among themselves. The elastic agent removes the last one's.

        Raises PoolError when there is no room for it: torch tells each rank something else then.
        """
        self._require_room()
        return f"file://{self._folder.ranks_store(attempt)}"

    def for_rpc(self, generation: int) -> str:
        """Of a client and the workers, for one generation. Raises as `for_ranks`."""
        path = self._folder.rpc_store(generation)
        path.unlink(missing_ok=True)
        self._require_room()
        return f"file://{path}"

    def is_whole(self, attempt: int) -> bool:
        """Whether the ranks of an attempt still find each other through theirs."""
        return self._folder.ranks_store(attempt).exists()

    def _require_room(self) -> None:
        trial = self._folder.path / "room"
        try:
            trial.write_bytes(bytes(ROOM_BYTES))
        except OSError as error:
            raise unwritable(self._folder, error) from None
        finally:
            with contextlib.suppress(OSError):
                trial.unlink(missing_ok=True)


class SharedStores:
    """One TCPStore in this process, listening at one address only; a prefix of its keys for each group."""

    def __init__(self, address: str) -> None:
        import torch.distributed as dist

        # A TCPStore that opens its own socket listens on all interfaces.
        listener = socket.create_server((address, 0), backlog=128)
        self._where = f"{SCHEME}://{address}:{listener.getsockname()[1]}"
        self._store = dist.TCPStore(
            address,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
            master_listen_fd=listener.detach(),
        )

    def for_ranks(self, attempt: int) -> str:
        """As `FileStores.for_ranks`; the keys of earlier attempts are removed."""
        return self._fresh("ranks", attempt)

    def for_rpc(self, generation: int) -> str:
        """As `FileStores.for_rpc`; the keys of earlier generations are removed."""
        return self._fresh("rpc", generation)

    def is_whole(self, attempt: int) -> bool:
        """It is in this process' memory."""
        return True

    def _fresh(self, kind: str, number: int) -> str:
        # Before torch 2.10 a store doesn't tell its keys. They stay, a few kB a group, and do no harm.
        if hasattr(self._store, "list_keys"):
            for key in self._store.list_keys():
                if key.startswith(f"{kind}-"):
                    self._store.delete_key(key)
        # A name that nobody can guess whom the coordinator did not tell. It keeps off strangers that write blindly;
        # one who speaks the store's protocol may have its keys listed.
        return f"{self._where}/{kind}-{number}-{secrets.token_hex(16)}"


def open_store(url: str, num_processes: int) -> Store:
    """The store that `url` names, for one of its `num_processes` members."""
    import torch.distributed as dist

    parts = urlsplit(url)
    if parts.scheme == "file":
        return dist.FileStore(parts.path, num_processes)
    assert parts.scheme == SCHEME and parts.hostname and parts.port, url
    store = dist.TCPStore(
        parts.hostname,
        parts.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
    )
    return dist.PrefixStore(parts.path.strip("/"), store)


@functools.cache
def teach_torch() -> None:
    """Let torch's RPC take our URLs as `init_method`. May be called again and again."""
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(SCHEME, _rendezvous)


def _rendezvous(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    query = parse_qs(urlsplit(url).query)
    rank, num_processes = int(query["rank"][0]), int(query["world_size"][0])
    yield open_store(url, num_processes), rank, num_processes
