"""What comes out of weights that are cut over the tensor axis is added up, or joined along its channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .context import Axis
from .paths import find
from .plan import TensorPlan
from .sequence import join, total


@contextlib.contextmanager
def sharded(module: nn.Module, plan: TensorPlan, axis: Axis) -> Iterator[None]:
    """`module`, which holds this rank's shards of its weights, gives what whole ones would give inside of the `with`.

    Every rank of the axis calls it alike.
    """
    handles = []
    for paths, whole in ((plan.rows, total), (plan.joined, _channels)) if axis.degree > 1 else ():
        for _, child in (pair for path in paths for pair in find(module, path)):
            handles.append(child.register_forward_hook(lambda module, args, out, whole=whole: whole(out, axis)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' channels, of which each has as many."""
    return join(x, x.dim() - 1, x.shape[-1] * axis.degree, axis)
