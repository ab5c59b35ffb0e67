"""The one of the two transports that a pool has, taken by its name."""

from __future__ import annotations

import sys

from .errors import PoolError
from .transport import RPC, Joiner


def require_available(transport: str | None) -> None:
    """Raises PoolError where no pool, or none with `transport`, can be."""
    import torch.distributed

    if sys.platform != "linux" or not torch.distributed.is_available():
        raise PoolError(
            f"a worker pool needs Linux and a torch with torch.distributed, which this one on {sys.platform} lacks; "
            "use Linux, or WSL2 on Windows"
        )
    if transport == RPC:
        from .rpc import require_available as require_rpc

        require_rpc()


def joiner(transport: str) -> Joiner:
    """Of a pool whose coordinator says that its transport is `transport`."""
    if transport == RPC:
        from .rpc import RpcJoiner

        return RpcJoiner()
    from .sockets import SocketJoiner

    return SocketJoiner()
