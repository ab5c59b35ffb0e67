"""Puts a `ModelPlan` into effect on a diffusers module for the length of a `with`.

Hooks cut and join tensors; attention is reached as `seam.py` says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from comfy_xdit.errors import InputError

from .attention import Attend, Layer, SequenceAttention
from .context import ParallelContext
from .paths import find
from .plan import Cut, ModelPlan
from .seam import Seam, torchs_own
from .sequence import cut, join
from .sharded import sharded
from .stages import Absent


@contextlib.contextmanager
def applied(
    module: nn.Module, plan: ModelPlan, context: ParallelContext, attend: Attend | None = None
) -> Iterator[Application]:
    """`module` computes with its tokens spread over `context`'s sequence axis inside the `with`.

    On the tensor axis it must hold this rank's shards of its weights; what they give is added up.

    Every rank of the axis calls the module with the same whole arguments, by keyword, and gets the
    whole output.
    attend: what its attention modules do; by default exact sequence parallelism. RuntimeError, which names the module,
    where one attends without it.
    Yields the application, whose `segment` says which tokens a forward computes.
    """
    work = Application(module, plan, context, attend or SequenceAttention(context))
    with torchs_own(module), sharded(module, plan.tensor, context.axis("tensor")):
        try:
            work.hook()
            yield work
            work.settle()
        finally:
            work.unhook()


class Application:
    """One plan on one module: the hooks, and the lengths of the streams in the forward that runs.

    segment: the tokens of each stream, (first, number), that forwards compute from now on; None for all.
    Arguments and output keep their whole size; outside the segment the output is 0.
    """

    def __init__(self, module: nn.Module, plan: ModelPlan, context: ParallelContext, attend: Attend) -> None:
        self.module = module
        self.plan = plan
        self.whole_axis = self.axis = context.axis("sequence")
        self.attend = attend
        self.segment: dict[str, tuple[int, int]] | None = None
        self.lengths: dict[str, int] = {}
        self.seams: list[Seam] = []
        self.is_settled = True
        self.handles: list[RemovableHandle] = []

    def hook(self) -> None:
        add = self.handles.append
        add(self.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(self.module.register_forward_hook(lambda m, a, out: self.settle()))
        for path, rule in self.plan.cut_outputs.items():
            for _, child in _required(self.module, path):
                add(child.register_forward_hook(lambda m, a, out, rule=rule: self._cut(out, rule)))
        for path, rule in self.plan.join_outputs.items():
            for _, child in _required(self.module, path):
                add(child.register_forward_hook(lambda m, a, out, rule=rule: self._join(out, rule)))
        for pattern, layer in self.plan.attention.items():
            for path, child in find(self.module, pattern):
                seam = Seam(path, layer.streams, layer.num_calls, self._ask)
                self.seams.append(seam)
                add(child.register_forward_pre_hook(seam.enter))
                add(child.register_forward_hook(seam.leave, always_call=True))

        for path, _ in own_blocks(self.module, self.plan):
            assert any(seam.path.startswith(f"{path}.") for seam in self.seams), (
                f"{path} of {type(self.module).__name__} has no attention; the plan is for another version of diffusers"
            )

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        for seam in self.seams:
            seam.close()

    def settle(self) -> None:
        """The last forward is over, also one that ended early, as a stage's does: no attention went past the engine.

        Raises RuntimeError, which names the module, where it did.
        """
        if not self.is_settled:
            self.is_settled = True
            for seam in self.seams:
                seam.settle()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert not args, "a planned model is called by keyword"
        self.settle()
        self.is_settled = False
        self.lengths.clear()
        cuts = {name: rule for name, rule in self.plan.cut_arguments.items() if kwargs.get(name) is not None}
        self.axis = self.whole_axis.alone if self._too_short(kwargs, cuts) else self.whole_axis
        return (), {**kwargs, **{name: self._cut(kwargs[name], rule) for name, rule in cuts.items()}}

    def _too_short(self, kwargs: dict[str, Any], cuts: dict[str, Cut]) -> bool:
        """Whether a rank would hold no token at all, which reshapes with an inferred size reject.

        So few tokens aren't worth cutting. Streams that are cut inside the model can't be known here.
        """
        if self.plan.cut_outputs:
            return False
        lengths = [kwargs[name].shape[rule.dim] for name, rule in cuts.items() if hasattr(kwargs[name], "shape")]
        return max(lengths) < self.whole_axis.degree

    def _cut(self, value: Any, rule: Cut) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(item, rule) for item in value)
        length = value.shape[rule.dim]
        known = self.lengths.setdefault(rule.stream, length)
        if known != length:
            raise InputError(
                f"{length} {rule.stream} tokens where the model has {known}; give as many everywhere"
            )
        if self.segment is not None:
            value = value.narrow(rule.dim, *self.segment[rule.stream])
        return cut(value, rule.dim, self.axis)

    def _ask(
        self,
        path: str,
        streams: tuple[str, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        lengths = tuple(self.lengths[stream] for stream in streams)
        runs = tuple((self.segment[stream],) for stream in streams) if self.segment is not None else None
        layer = Layer(path=path, lengths=lengths, runs=runs, num_shards=self.axis.degree)
        return self.attend(q, k, v, layer, mask=mask, scale=scale)

    def _join(self, value: Tensor, rule: Cut) -> Tensor:
        length = self.lengths[rule.stream]
        if self.segment is None:
            return join(value, rule.dim, length, self.axis)
        first, size = self.segment[rule.stream]
        shape = list(value.shape)
        shape[rule.dim] = length
        whole = value.new_zeros(shape)
        whole.narrow(rule.dim, first, size).copy_(join(value, rule.dim, size, self.axis))
        return whole


def own_blocks(module: nn.Module, plan: ModelPlan) -> list[tuple[str, nn.Module]]:
    """The blocks that are here, which other stages' aren't, in the order in which they run."""
    found = [block for name in plan.blocks for block in find(module, f"{name}.*")]
    return [(path, block) for path, block in found if not isinstance(block, Absent)]


def _required(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    found = find(module, pattern)
    assert found, f"{type(module).__name__} has no {pattern}; the plan is for another version of diffusers"
    return found
