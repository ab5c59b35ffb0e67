"""The transport of pools on several machines: torch.distributed.rpc.

Facts that shape this file, each found by trying: a group in which a process died takes no new member, so
every client and every restart gets a group of its own, with names that never return; a second group in
one process needs torch's store prefix counter at zero; `graceful=False` is the only shutdown that returns
when a peer is gone; the `shm` transport spins on a core in every process, even when nobody speaks, while `uv`
sleeps (and listens where it is told to, as gloo does); and torch's unpickler runs whatever a peer sends,
so ours takes its place and lets through what an exchange of text and tensors needs.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import logging
import os
import pickle
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch import Tensor

from .errors import PoolError
from .network import LOOPBACK
from .stores import teach_torch
from .transport import ASIDE, Answer, ClientGroup, Poll, Request, Serve

log = logging.getLogger("comfy_xdit")

JOIN_TIMEOUT_S = 10.0
POLL_S = 0.05

Handler = Callable[[int, str, list[Tensor]], Answer]
"""What RPC runs on one of its threads, and answers with what it returns."""

# A process has one RPC agent, and torch keeps it in its own globals; this serialises who changes it.
_agent_lock = threading.Lock()

# TensorPipe looks up its address once in a process' life.
_listens_on: str | None = None


def serve(serial: int, text: str, tensors: list[Tensor]) -> tuple[str, list[Tensor]]:
    """Names the one remote function; the receiving unpickler puts the worker's handler in its place."""
    raise AssertionError("serve is only named, never run")


def require_available() -> None:
    """Raises PoolError where torch has no RPC."""
    import torch.distributed.rpc

    if not torch.distributed.rpc.is_available():
        raise PoolError(
            f"a pool on several machines needs a torch with distributed RPC, which torch {torch.__version__} lacks; "
            "use one on this machine, or another build of torch"
        )


def require_interface(interface: str) -> None:
    """Raises PoolError when this process can't be reached through `interface` any more.

    One that listens on a network already serves a pool of this machine as well.
    """
    if _listens_on not in (None, interface) and interface != LOOPBACK:
        raise PoolError(
            f"this process has been in a pool over {_listens_on}, and torch's RPC listens on one interface in a "
            f"process' life, so it can't use one over {interface}; start it anew (ComfyUI, say) and use that pool first"
        )


def require_free() -> None:
    """Raises PoolError when this process is in an RPC group of somebody else's."""
    name = _current_name()
    if name is not None and not re.fullmatch(r"(client|worker\d+)-.+-g\d+", name):
        raise PoolError(
            f"this process already takes part in torch RPC as {name!r}, and it can be in one group only; "
            "switch off what uses it, or run that in a process of its own"
        )


def _allow_list(handler: Handler | None) -> dict[tuple[str, str], Any]:
    """The names that a pickle may mention, with what they give."""
    from torch.distributed.rpc import api, internal

    receiver = internal._InternalRPCPickler

    def attribute(owner: Any, name: str) -> Any:
        # Tensors travel beside the pickle and are fetched by this one classmethod.
        if owner is not receiver or name != "_tensor_receiver":
            raise pickle.UnpicklingError(f"refused attribute {name!r}")
        return receiver._tensor_receiver

    allowed = {
        ("builtins", "getattr"): attribute,
        ("builtins", "set"): set,
        ("builtins", "RuntimeError"): RuntimeError,
        ("_pickle", "UnpicklingError"): pickle.UnpicklingError,
        ("torch.distributed.rpc.internal", "_InternalRPCPickler"): receiver,
        ("torch.distributed.rpc.internal", "PythonUDF"): internal.PythonUDF,
        ("torch.distributed.rpc.internal", "RemoteException"): internal.RemoteException,
        # RPC's own handshake, while a group is joined.
        ("torch.distributed.rpc.api", "_gather_to_leader"): api._gather_to_leader,
        ("torch.distributed.rpc.api", "_broadcast_to_followers"): api._broadcast_to_followers,
        ("torch.distributed.rpc.api", "AllGatherStates"): api.AllGatherStates,
    }
    if handler is not None:
        allowed[serve.__module__, serve.__name__] = handler
    return allowed


def make_unpickler(allowed: dict[tuple[str, str], Any]) -> type[pickle.Unpickler]:
    """An unpickler class that knows the names in `allowed` and refuses all others."""

    class AllowListUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return allowed[module, name]
            except KeyError:
                raise pickle.UnpicklingError(f"refused {module}.{name}") from None

        def persistent_load(self, pid: Any) -> Any:
            raise pickle.UnpicklingError("refused a persistent id")

    return AllowListUnpickler


@contextlib.contextmanager
def _bounded_private_join(interface: str) -> Iterator[None]:
    """While joining: give up in time, listen on `interface` only, and take no object from a peer."""
    from torch.distributed import distributed_c10d
    from torch.distributed.rpc import constants

    timeout, unpickler = constants.DEFAULT_PROCESS_GROUP_TIMEOUT, distributed_c10d._unpickler  # type: ignore[attr-defined]
    names = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    environment = {name: os.environ.get(name) for name in names}
    constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(seconds=JOIN_TIMEOUT_S)
    distributed_c10d._unpickler = make_unpickler({})  # type: ignore[attr-defined]
    os.environ.update(dict.fromkeys(names, interface))
    try:
        with warnings.catch_warnings():
            # torch's own join warns about the way it uses its process group.
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timeout
        distributed_c10d._unpickler = unpickler  # type: ignore[attr-defined]
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclasses.dataclass(frozen=True, kw_only=True)
class RpcMember:
    """A process in a generation's group: rank 0 is the client, rank r + 1 the worker of rank r.

    store: the URL of a store of `stores`. interface: of this process' machine, where it listens.
    """

    pool: str
    generation: int
    store: str
    interface: str
    rank: int
    num_processes: int

    def name(self, rank: int) -> str:
        who = "client" if rank == 0 else f"worker{rank - 1}"
        return f"{who}-{self.pool}-g{self.generation}"


class RpcGroup:
    """Membership in one generation's RPC group. Made by `join`."""

    def __init__(self, member: RpcMember) -> None:
        self.member = member
        self.generation = member.generation

    def join(self, handler: Handler | None = None) -> None:
        """Become a member; returns when all members are there, or raises RuntimeError in about
        JOIN_TIMEOUT_S. A group that this process was in before is left.

        handler: runs what others send here, on one of RPC's threads; None on a client.
        """
        from torch.distributed import rpc
        from torch.distributed.rpc import api, internal

        global _listens_on
        member = self.member
        with _agent_lock:
            _leave_current()
            require_interface(member.interface)
            _listens_on = _listens_on or member.interface
            # torch remembers joins by the members' names; a pool that was removed and made anew counts from 1.
            api._all_gather_sequence_id.clear()
            api._all_gather_sequence_id_to_states.clear()
            teach_torch()
            internal._unpickler = make_unpickler(_allow_list(handler))  # type: ignore[misc]
            rpc._init_counter = 0  # type: ignore[attr-defined]
            options = rpc.TensorPipeRpcBackendOptions(
                init_method=member.store,
                rpc_timeout=JOIN_TIMEOUT_S,
                num_worker_threads=8,
                _transports=["uv"],
                # The other channels keep shared memory, and are no faster for tensors of a latent's size.
                _channels=["basic"],
            )
            try:
                with _bounded_private_join(member.interface):
                    rpc.init_rpc(
                        member.name(member.rank),
                        rank=member.rank,
                        world_size=member.num_processes,
                        rpc_backend_options=options,
                    )
            except BaseException:
                _leave_current()
                raise

    @property
    def is_current(self) -> bool:
        """Whether this process is still in the group: joining another one leaves this one."""
        return _current_name() == self.member.name(self.member.rank)

    def send(self, ranks: Sequence[int], serial: int, text: str, tensors: list[Tensor]) -> list[Future[Answer]]:
        """As `transport.ClientGroup.send`."""
        return [self._send(rank, serial, text, tensors) for rank in ranks]

    def _send(self, rank: int, serial: int, text: str, tensors: list[Tensor]) -> Future[Answer]:
        from torch.distributed import rpc

        future: Future[Answer] = Future()

        def resolve(done: Any) -> None:
            try:
                future.set_result(done.value())
            except Exception as error:
                future.set_exception(ConnectionError(str(error)))

        try:
            # It never times out by itself.
            asked = rpc.rpc_async(self.member.name(rank + 1), serve, args=(serial, text, tensors), timeout=0)
        except RuntimeError as error:
            future.set_exception(ConnectionError(str(error)))
        else:
            asked.add_done_callback(resolve)
        return future

    def leave(self) -> None:
        """Stop taking part; does not wait for the others. Harmless when left already."""
        with _agent_lock:
            if self.is_current:
                _leave_current()


class RpcWorker:
    """A worker's membership: hands requests to `serve` in the order of their numbers.

    Two of RPC's threads may bring two messages the wrong way round, on one rank and not on another; their
    collectives would then meet each other's.
    """

    def __init__(self, member: RpcMember, serve: Serve) -> None:
        """Joins, as `RpcGroup.join`."""
        self.generation = member.generation
        self._serve = serve
        # Re-entrant: a handler may answer at once.
        self._lock = threading.RLock()
        self._early: dict[int, Request] = {}
        self._serial = 0
        self._waiting: set[Future[Answer]] = set()
        self._is_over = False
        self._group = RpcGroup(member)
        self._group.join(self._accept)

    @property
    def is_current(self) -> bool:
        return not self._is_over and self._group.is_current

    def leave(self) -> None:
        # Every waiting RPC thread first: leaving the group joins them.
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting, set()
            self._early.clear()
        for future in waiting:
            future.set_exception(RuntimeError("the client's lease is over"))
        self._group.leave()

    def _accept(self, serial: int, text: str, tensors: list[Tensor]) -> Answer:
        """Runs on an RPC thread: what the peer sent is not yet trusted."""
        if not (type(serial) is int and isinstance(text, str) and isinstance(tensors, list)):
            # Of all exceptions the client's unpickler lets this one through.
            raise RuntimeError("malformed message: wrong argument types")
        future: Future[Answer] = Future()
        request = Request(serial, text, tensors, lambda text, tensors: lambda: self._resolve(future, (text, tensors)))
        with self._lock:
            if self._is_over:
                raise RuntimeError("the client's lease is over")
            self._waiting.add(future)
            if serial != ASIDE:
                self._early[serial] = request
                while (ready := self._early.pop(self._serial + 1, None)) is not None:
                    self._serial += 1
                    self._serve(ready)
        if serial == ASIDE:
            self._serve(request)
        return future.result()

    def _resolve(self, future: Future[Answer], answer: Answer) -> None:
        with self._lock:
            is_waiting = future in self._waiting
            self._waiting.discard(future)
        if is_waiting:
            future.set_result(answer)


class RpcJoiner:
    """A client's way into RPC groups, on a thread of its own: a join blocks for up to its limit when a worker dies
    meanwhile."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def check(self, interface: str) -> None:
        require_available()
        require_interface(interface)
        require_free()

    def join(self, pool: str, order: dict[str, Any], num_ranks: int, joined: Callable[[ClientGroup], None]) -> None:
        group = RpcGroup(
            RpcMember(
                pool=pool,
                generation=order["generation"],
                store=order["store"],
                interface=order["interface"],
                rank=0,
                num_processes=num_ranks + 1,
            )
        )

        def run() -> None:
            try:
                group.join()
            except Exception as error:
                # The coordinator counts who joined, gives up on this generation and makes the next.
                log.info("joining generation %d of pool %r: %s", group.generation, pool, error)
                return
            joined(group)

        self._thread = threading.Thread(target=run, name="comfy-xdit-join", daemon=True)
        self._thread.start()

    def settle(self, poll: Poll) -> None:
        # torch cannot break a join off, and can do one at a time.
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(POLL_S)
            if poll is not None:
                poll()


def _current_name() -> str | None:
    from torch.distributed.rpc import api

    if not api._is_current_rpc_agent_set():
        return None
    return api._get_current_rpc_agent().get_worker_info().name


def _leave_current() -> None:
    from torch.distributed import rpc
    from torch.distributed.rpc import internal

    require_free()
    if _current_name() is not None:
        rpc.shutdown(graceful=False)
    internal._unpickler = pickle.Unpickler  # type: ignore[misc]


# An RPC agent that is alive at interpreter exit aborts the process.
def _leave_at_exit() -> None:
    if "torch.distributed.rpc" in sys.modules and _agent_lock.acquire(timeout=1):
        _leave_current()


atexit.register(_leave_at_exit)


def loads_safely(data: bytes, handler: Handler | None = None) -> Any:
    """What `data` unpickles to under the workers' rules; for tests and for judging a recorded attack."""
    return make_unpickler(_allow_list(handler))(io.BytesIO(data)).load()
