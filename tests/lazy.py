"""Ranks whose connections are made as NCCL makes them: at a pair's first message in a group, both waiting for it."""

from __future__ import annotations

import contextlib
import datetime
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import modes
import torch
import torch.distributed as dist

from comfy_xdit.parallel import groups as groups_module
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.spec import ParallelSpec


@contextlib.contextmanager
def lazy_connections(wait_s: float) -> Iterator[list[str]]:
    """The connections that this rank has made; a rank that nobody meets in time raises RuntimeError."""
    waiting_room = dist.new_group(timeout=datetime.timedelta(seconds=wait_s))
    real = {name: getattr(dist, name) for name in ("send", "recv", "isend", "irecv")}
    met: list[str] = []

    def meet(peer: int, group: Any) -> None:
        me, name = dist.get_rank(), group.group_name
        pair = f"{name} {min(me, peer)} {max(me, peer)}"
        if pair in met:
            return
        token, tag = torch.zeros(1), zlib.crc32(pair.encode()) % 2**20
        for sends in (me < peer, me > peer):
            real["send" if sends else "recv"](token, peer, group=waiting_room, tag=tag)
        met.append(pair)

    def lazy(name: str) -> Any:
        def run(x: torch.Tensor, peer: int, group: Any = None) -> Any:
            meet(peer, group)
            return real[name](x, peer, group=group)

        return run

    with mock.patch.multiple(dist, **{name: lazy(name) for name in real}):
        yield met


def run_mode(spec: ParallelSpec, job: modes.Job, introduced: bool, wait_s: float) -> tuple[dict[str, Any], list[str]]:
    """Job: `modes.run_mode` in groups of its own, and the connections. introduced: stages meet when groups are made."""
    cache = GroupCache(dist.get_world_size())
    with contextlib.ExitStack() as stack:
        met = stack.enter_context(lazy_connections(wait_s))
        stack.enter_context(mock.patch.object(modes, "groups", lambda: cache))
        if not introduced:
            stack.enter_context(mock.patch.object(groups_module, "_introduce", lambda link, line: None))
        return modes.run_mode(spec, job), met
