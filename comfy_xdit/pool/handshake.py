"""Both ends of a connection over the network show that they hold the pool's key, without sending it.

The coordinator asks with a number that never returns. The worker answers with an HMAC of it and of a number of its own,
and takes nothing from the coordinator before that has done the same. The words in the MAC differ for the two ends and
name the coordinator's address, so that nobody's answer can be sent back to it as a question. What is said afterwards
is neither encrypted nor signed. Source: ISO/IEC 9798-4, mutual authentication in three passes; HMAC-SHA-256, RFC 2104.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import PoolError
from .fields import Malformed, one_of, text
from .wire import Wire

KEY_BYTES = 32
HEX_CHARS = 2 * KEY_BYTES
"""Of a key, a number and a proof."""

KEY_VARIABLE = "COMFY_XDIT_KEY"

PROOF_LIMIT_S = 10.0
POLL_S = 0.25

NO_PROOF = "it does not hold this pool's key"


class Challenge:
    """The coordinator's side of one connection. place: the coordinator's "HOST:PORT"."""

    def __init__(self, key: bytes, place: str) -> None:
        self._key, self._place = key, place
        self._number = secrets.token_hex(KEY_BYTES)

    @property
    def question(self) -> dict[str, Any]:
        return {"type": "challenge", "number": self._number}

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The coordinator's own proof, for a peer that gave its. Raises Malformed for one that did not."""
        one_of(message, "type", ("proof",))
        number = _hex(message, "number")
        numbers = (self._number, number)
        if not hmac.compare_digest(_hex(message, "proof"), _mac(self._key, "worker", self._place, *numbers)):
            raise Malformed(NO_PROOF)
        return {"type": "proof", "proof": _mac(self._key, "coordinator", self._place, *numbers)}


def challenges(path: Path, place: str) -> Callable[[], Challenge]:
    """Makes the challenges of the coordinator at `place`, with the key at `path`. Raises as `kept_key`."""
    key = kept_key(path)
    return lambda: Challenge(key, place)


def prove(wire: Wire, key: bytes) -> None:
    """A worker's side, before it says anything else.

    Raises PoolError where the other end does not prove itself, ConnectionError where it hangs up or says nothing.
    """
    # The address that was really reached: who passes the question on from another one gets a useless answer.
    place = "{}:{}".format(*wire.sock.getpeername())
    asked = _next(wire)
    try:
        one_of(asked, "type", ("challenge",))
        number = secrets.token_hex(KEY_BYTES)
        numbers = (_hex(asked, "number"), number)
        wire.send({"type": "proof", "number": number, "proof": _mac(key, "worker", place, *numbers)})
        answer = _next(wire)
        if answer.get("type") == "refused":
            raise PoolError(f"the coordinator at {place} let this worker not in: {str(answer.get('reason'))[:200]}")
        one_of(answer, "type", ("proof",))
        if not hmac.compare_digest(_hex(answer, "proof"), _mac(key, "coordinator", place, *numbers)):
            raise Malformed(NO_PROOF)
    except Malformed as error:
        raise PoolError(
            f"who listens at {place} is not this pool's coordinator ({error}); "
            "run what `comfy-xdit pool start --nodes` printed, with the key file that it names"
        ) from None


def _next(wire: Wire) -> dict[str, Any]:
    deadline = time.monotonic() + PROOF_LIMIT_S
    while time.monotonic() < deadline:
        if messages := wire.wait(POLL_S):
            return messages[0]
    raise ConnectionError(f"no answer within {PROOF_LIMIT_S:.0f} s")


def _hex(message: Mapping[str, Any], name: str) -> str:
    value = text(message, name, max_chars=HEX_CHARS)
    if len(value) != HEX_CHARS or set(value) - set("0123456789abcdef"):
        raise Malformed(f"{name!r} is no {HEX_CHARS} hex digits")
    return value


def _mac(key: bytes, who: str, place: str, *numbers: str) -> str:
    return hmac.digest(key, "|".join(("comfy-xdit", who, place, *numbers)).encode(), "sha256").hex()


# The key


def kept_key(path: Path) -> bytes:
    """The key that lies at `path`, made when there is none.

    It stays with the pool's folder, so that a pool started anew has its machines back. Raises PoolError.
    """
    made = path.with_suffix(f".{os.getpid()}")
    try:
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
        # Whole or not at all, and never in place of another one.
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
    except OSError as error:
        raise PoolError(f"cannot write the pool's key to {path} ({error.strerror}); make room there") from None
    finally:
        made.unlink(missing_ok=True)
    return read_key(path)


def read_key(path: Path) -> bytes:
    """The key in a file that nobody else can read. Raises PoolError."""
    try:
        with open(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            found = file.read(HEX_CHARS + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PoolError(f"cannot read the pool's key in {path} ({why}); copy the head's there", kind="input") from None
    if stat.S_IMODE(mode) & 0o077:
        raise PoolError(f"others can read the pool's key in {path}; run chmod 600 {path}", kind="input")
    return _key_of(found, str(path))


def given_key(file: Path | None, environment: Mapping[str, str]) -> bytes:
    """The key that a worker was given: in a file, or in $COMFY_XDIT_KEY. Raises PoolError."""
    if file is not None:
        return read_key(file)
    if KEY_VARIABLE in environment:
        return _key_of(environment[KEY_VARIABLE].strip(), f"${KEY_VARIABLE}")
    raise PoolError(
        f"a pool on several machines has a key; give its file with --key-file, or the key itself in ${KEY_VARIABLE}: "
        "`comfy-xdit pool start --nodes` says where it lies on the head",
        kind="input",
    )


def _key_of(found: str, where: str) -> bytes:
    if len(found) != HEX_CHARS or set(found) - set("0123456789abcdef"):
        raise PoolError(f"{where} holds no key of {HEX_CHARS} hex digits; copy the head's key file", kind="input")
    return bytes.fromhex(found)
