"""A client's view of a pool: take a lease, send messages, get results or one sentence of error."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

from ..messages import Failure, LeaseEnded, Message, Result, decode, encode
from .beat import Beat
from .errors import PoolError
from .failure_policy import worst
from .folder import pool_folder, where_log
from .joiner import joiner, require_available
from .network import LOOPBACK, Network
from .start import POLL_S, reach, say
from .transport import ASIDE, RPC, Answer, ClientGroup, Joiner, Poll
from .wire import Wire

__all__ = ["Pool", "PoolError"]

log = logging.getLogger("comfy_xdit")

CALL_TIMEOUT_S = 600.0
VERDICT_LIMIT_S = 15.0
"""How long a client whose message failed waits for the coordinator's word; one that works gives it within 4 s."""

# A lease of any pool in this process excludes the others': two threads that each held one pool and waited for the
# other's would wait for ever, and torch lets a process be in one RPC group.
_process_lease = threading.RLock()


class Pool:
    """A connection to a pool. Made by `connect`; one object serves any number of jobs, also across
    restarts of the workers and of the pool. Threads take turns.
    """

    def __init__(self, name: str, devices: str, start: bool, options: dict[str, Any]) -> None:
        self.name = name
        self.generation = 0
        """Changes when the workers or the group are new: what was sent before must be sent again."""
        self._asked = (devices, start, options)
        self._wire: Wire | None = None
        self._unread: list[dict[str, Any]] = []
        self._about: dict[str, Any] = {}
        self._group: ClientGroup | None = None
        self._joiner: Joiner | None = None
        self._beat: Beat | None = None
        self._lost: dict[str, Any] | None = None
        """The coordinator's word that the group of this lease is gone, until it was told as an error."""
        self._depth = 0
        self._serial = 0

    @classmethod
    def connect(
        cls, name: str = "default", devices: str = "auto", *, start: bool = True, **options: Any
    ) -> Pool:
        """The pool `name`, started on `devices` when none runs and `start`.

        devices: "auto" (a running pool as it is; else all CUDA devices; else one process per core, at most
        4), "cuda:0,1", "cpu:2". options: `service`, `path`, `network` and `transport` of `start.spawn`.
        Raises PoolError.
        """
        require_available(RPC if options.get("network") else options.get("transport"))
        pool = cls(name, devices, start, options)
        pool._open(None)
        return pool

    @property
    def devices(self) -> list[str]:
        """One device per rank."""
        return list(self._about["devices"])

    @property
    def num_ranks(self) -> int:
        return len(self._about["devices"])

    @property
    def network(self) -> Network | None:
        """Between the machines of the pool; None where it is on this machine alone."""
        fields = self._about["network"]
        return None if fields is None else Network(**fields)

    def status(self) -> dict[str, Any]:
        """What `comfy-xdit pool status --json` shows; any thread may ask, during a job too."""
        return status(self.name)

    def close(self) -> None:
        """Leave the pool; it runs on. The object can be used again."""
        self._drop_group()
        if self._beat is not None:
            self._beat.end()
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        # With the sockets of a group that was to be joined.
        self._unread = []

    # Leases

    @contextlib.contextmanager
    def lease(self, poll: Poll = None) -> Iterator[Pool]:
        """Have the pool for oneself; other clients wait until the block ends. May be nested.

        poll: called about every 50 ms while waiting; what it raises ends the wait.
        Raises PoolError when the pool is gone or its workers cannot start.
        """
        while not _process_lease.acquire(timeout=POLL_S):
            if poll is not None:
                poll()
        try:
            if self._depth == 0:
                self._acquire(poll)
            self._depth += 1
            try:
                yield self
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._end_lease()
        finally:
            _process_lease.release()

    def _end_lease(self) -> None:
        if self._group is not None and self._group.is_current:
            # In line behind a message that was abandoned; nobody waits for the answer.
            self._send(LeaseEnded())
        if self._beat is not None:
            self._beat.stop()
        self._lost = None
        self._tell({"type": "end"})

    def _acquire(self, poll: Poll) -> None:
        """Wait until this client holds a generation that works."""
        self._lost = None
        try:
            for attempt in range(3):
                if self._wire is None:
                    self._open(poll)
                try:
                    self._wait_for_grant(poll)
                    return
                except ConnectionError:
                    self.close()
                    if attempt == 2:
                        raise PoolError(
                            f"pool {self.name!r} closed the connection again and again; "
                            f"{where_log(self.name)}"
                        ) from None
        except BaseException:
            self._tell({"type": "end"})
            raise

    def _open(self, poll: Poll) -> None:
        devices, start, options = self._asked
        was = self.network if self._about else None
        self._wire, self._about = reach(self.name, devices, start=start, poll=poll, was=was, **options)
        self._group, self._unread = None, []
        self._joiner, self._beat = joiner(self._about["transport"]), Beat(self._wire)

    def _wait_for_grant(self, poll: Poll) -> None:
        wire, joiner, beat = self._wire, self._joiner, self._beat
        assert wire is not None and joiner is not None and beat is not None
        joiner.check(self.network.interface if self.network else LOOPBACK)
        joiner.settle(poll)
        if self._group is not None and not self._group.is_current:
            self._drop_group()
        held = 0 if self._group is None else self._group.generation
        wire.send({"type": "lease", "generation": held})
        while True:
            message = self._hear(POLL_S)
            kind = None if message is None else message.get("type")
            if message is None:
                if poll is not None:
                    poll()
            elif kind == "grant" and self._group_is(message["generation"]):
                beat.start()
                return
            elif kind == "waiting":
                log.info("waiting for pool %r: %s", self.name, message["text"])
            elif kind == "join":
                self._drop_group()
                joiner.join(self.name, message, self.num_ranks, self._joined)
            elif kind == "lost":
                self._drop_group()
                log.info("waiting for pool %r: %s", self.name, message["reason"])
                joiner.settle(poll)
                wire.send({"type": "lease", "generation": 0})
            elif kind == "refused":
                raise PoolError(str(message["reason"]))

    def _hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The coordinator's next message, if one comes in time. Raises ConnectionError when the coordinator is gone."""
        if not self._unread and self._wire is not None:
            self._unread = self._wire.wait(timeout_s)
        return self._unread.pop(0) if self._unread else None

    def _group_is(self, generation: int) -> bool:
        return self._group is not None and self._group.generation == generation

    def _joined(self, group: ClientGroup) -> None:
        self._group = group
        self.generation, self._serial = group.generation, 0
        self._tell({"type": "joined", "generation": group.generation})

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None

    # Messages

    def call(self, message: Message, *, poll: Poll = None, timeout_s: float | None = None) -> Result:
        """Rank 0's result of `message`, which all ranks run.

        Opens a lease of its own when none is open. poll: called about every 50 ms; when it raises, the wait
        ends, the workers finish this message, and its answer is dropped; when it returns True, the job has come
        further. timeout_s: the workers are restarted when they take longer, or to come further; None is 600 s.
        Raises PoolError.
        """
        return self.call_all(message, poll=poll, timeout_s=timeout_s)[0]

    def call_all(
        self, message: Message, *, poll: Poll = None, timeout_s: float | None = None
    ) -> list[Result]:
        """Every rank's result; else as `call`."""
        with self.lease(poll):
            if self._lost is not None:
                # After an answer that was whole. What was sent before is gone, so going on would be wrong.
                raise self._error([], self._serial + 1)
            if self._group is None:
                self._acquire(poll)
            return self._exchange(message, poll, CALL_TIMEOUT_S if timeout_s is None else timeout_s)

    def aside(self, message: Message, *, poll: Poll = None, timeout_s: float = 5.0) -> Result | None:
        """Rank 0's answer to a message that is answered at once, beside the one that runs (`Peek`, `Cancel`).

        For the `poll` of a `call`, or after it was given up. poll: called about every 50 ms while no answer is there;
        what it raises ends the wait, and the answer is lost. None when no answer comes in time (with 0 it is sent, and
        not waited for): the call itself tells what is wrong.
        """
        if self._group is None:
            return None
        [future] = self._group.send([0], ASIDE, *encode(message))
        deadline = time.monotonic() + timeout_s
        while not future.done() and (left_s := deadline - time.monotonic()) > 0:
            wait([future], min(POLL_S, left_s))
            if poll is not None and not future.done():
                poll()
        answer = _answer(future)
        return answer if isinstance(answer, Result) else None

    def _exchange(self, message: Message, poll: Poll, timeout_s: float) -> list[Result]:
        wakeup = threading.Event()
        futures = self._send(message, wakeup)
        deadline, is_late = time.monotonic() + timeout_s, False
        while not (is_late or _is_over(futures) or self._is_lost()):
            wakeup.wait(POLL_S)
            wakeup.clear()
            is_late = time.monotonic() > deadline and not _is_over(futures)
            if not is_late and poll is not None and poll() is True:
                deadline = time.monotonic() + timeout_s
        answers = [_answer(future) for future in futures]
        results = [answer for answer in answers if isinstance(answer, Result)]
        if len(results) == len(answers):
            return results
        assert self._lost is not None or self._group is not None
        if is_late:
            self._ask({"type": "restart", "reason": f"no answer to {type(message).__name__} within {timeout_s:g} s"})
        else:
            is_broken = any(answer is None for answer in answers)
            self._ask({"type": "judge", "serial": self._serial, "is_broken": is_broken})
        raise self._error([answer for answer in answers if isinstance(answer, Failure)], self._serial)

    def _send(self, message: Message, wakeup: threading.Event | None = None) -> list[Future[Answer]]:
        assert self._group is not None
        text, tensors = encode(message)
        futures = self._group.send(range(self.num_ranks), self._serial + 1, text, tensors)
        self._serial += 1
        if wakeup is not None:
            for future in futures:
                future.add_done_callback(lambda _: wakeup.set())
        return futures

    def _ask(self, question: dict[str, Any]) -> None:
        """Have the coordinator judge a message that failed. What it says is in `_lost`: None when the workers go on."""
        if self._lost is not None or self._group is None:
            return
        numbers = {"generation": self._group.generation, "serial": self._serial}
        self._tell({**question, "generation": numbers["generation"]})
        deadline = time.monotonic() + VERDICT_LIMIT_S
        while time.monotonic() < deadline:
            message = self._notice(POLL_S)
            if self._lost is not None or message == {"type": "keep", **numbers}:
                return
        self._drop_group()
        self._lost = {"reason": f"the supervisor of pool {self.name!r} does not answer", "restarts": False}

    def _is_lost(self) -> bool:
        """Whether the coordinator has said, by now, that the group is gone."""
        while self._lost is None and self._notice(0) is not None:
            pass
        return self._lost is not None

    def _notice(self, timeout_s: float) -> dict[str, Any] | None:
        """The coordinator's next message within a lease; keeps in mind that the group is lost."""
        try:
            message = self._hear(timeout_s)
        except ConnectionError:
            self.close()
            message = {"type": "lost", "reason": f"the supervisor of pool {self.name!r} ended", "restarts": True}
        if message is not None and message.get("type") == "lost":
            self._drop_group()
            self._lost = message
        return message

    def _error(self, failures: list[Failure], serial: int) -> PoolError:
        """The sentence for what failed: of the coordinator, if the workers are lost, else of the ranks themselves.

        serial: of the message that won't have an answer.
        """
        lost, self._lost = self._lost, None
        told = [dataclasses.asdict(failure) for failure in failures]
        if lost is not None:
            told = [lost["failure"]] if lost.get("failure") else []
        if told:
            cause = worst(told)
            if lost is not None and (lost["generation"], lost["serial"]) != (self.generation, serial):
                sentence = (
                    f"the run before this one, which was given up, failed later: {cause['message']}; the pool restarts "
                    "its workers for that, so run the job again"
                )
                return PoolError(sentence, kind="lost", trace=cause["trace"])
            return PoolError(cause["message"], kind=cause["kind"], trace=cause["trace"])
        what = str(lost["reason"]) if lost is not None else "a worker's answer was lost"
        then = "the pool restarts its workers, so run" if lost is not None and lost["restarts"] else "run"
        return PoolError(f"{what}; {then} the job again ({where_log(self.name)})", kind="lost")

    def _tell(self, message: dict[str, Any]) -> None:
        if self._wire is not None:
            with contextlib.suppress(ConnectionError):
                self._wire.send(message)


def _is_over(futures: list[Future[Answer]]) -> bool:
    """Whether all ranks have answered, or the connection to one has ended."""
    done = [future for future in futures if future.done()]
    return len(done) == len(futures) or any(future.exception() is not None for future in done)


def _answer(future: Future[Answer]) -> Result | Failure | None:
    """What a worker answered; None when it did not (yet), or the connection to it broke."""
    if not future.done():
        return None
    try:
        message = decode(*future.result())
    except (ConnectionError, ValueError) as error:
        log.debug("no answer: %s", error)
        return None
    return message if isinstance(message, (Result, Failure)) else None


def status(name: str = "default") -> dict[str, Any]:
    """What the pool `name` says about itself. Raises PoolError when it does not run."""
    try:
        wire, answer = say(pool_folder(name), {"type": "status"})
    except ConnectionError:
        raise PoolError(
            f"no pool {name!r} runs; start it with `comfy-xdit pool start --name {name}`"
        ) from None
    wire.close()
    return answer
