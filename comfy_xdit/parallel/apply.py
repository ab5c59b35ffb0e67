"""Puts a `ModelPlan` into effect on a diffusers module for the length of a `with`.

Hooks cut and join tensors. Attention is reached where every diffusers model ends up, at
`F.scaled_dot_product_attention`, through a torch function mode: it is on only in this thread and only
while one of the plan's attention modules runs, so nothing is patched and nothing is left behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from comfy_xdit.errors import InputError

from .attention import Attend, Layer, SequenceAttention
from .context import ParallelContext
from .plan import Cut, Exact, ModelPlan
from .sequence import cut, join, total


@contextlib.contextmanager
def applied(
    module: nn.Module, plan: ModelPlan, context: ParallelContext, attend: Attend | None = None
) -> Iterator[Application]:
    """`module` computes with its tokens spread over `context`'s sequence axis inside the `with`.

    On the tensor axis it must hold this rank's shards of its weights; what they give is added up.

    Every rank of the axis calls the module with the same whole arguments, by keyword, and gets the
    whole output.
    attend: what its attention modules do; by default exact sequence parallelism.
    Yields the application, whose `segment` says which tokens a forward computes.
    """
    work = Application(module, plan, context, attend or SequenceAttention(context))
    try:
        work.hook()
        yield work
    finally:
        work.unhook()


def find(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """Submodules whose path fits `pattern`, in order; a `*` is any one child, a missing name fits nothing."""
    found = [("", module)]
    for part in pattern.split("."):
        found = [
            (f"{path}.{name}" if path else name, child)
            for path, parent in found
            for name, child in parent.named_children()
            if part in ("*", name)
        ]
    return found


class Application:
    """One plan on one module: the hooks, and the lengths of the streams in the forward that runs.

    segment: the tokens of each stream, (first, number), that forwards compute from now on; None for all.
    Arguments and output keep their whole size; outside the segment the output is 0.
    """

    def __init__(self, module: nn.Module, plan: ModelPlan, context: ParallelContext, attend: Attend) -> None:
        self.module = module
        self.plan = plan
        self.whole_axis = self.axis = context.axis("sequence")
        self.tensor_axis = context.axis("tensor")
        self.attend = attend
        self.segment: dict[str, tuple[int, int]] | None = None
        self.lengths: dict[str, int] = {}
        self.given: dict[str, Any] = {}
        self.seams: list[_Seam] = []
        self.handles: list[RemovableHandle] = []

    def hook(self) -> None:
        add = self.handles.append
        add(self.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        for path, rule in self.plan.cut_outputs.items():
            for _, child in _required(self.module, path):
                add(child.register_forward_hook(lambda m, a, out, rule=rule: self._cut(out, rule)))
        for path, rule in self.plan.join_outputs.items():
            for _, child in _required(self.module, path):
                add(child.register_forward_hook(lambda m, a, out, rule=rule: self._join(out, rule)))
        for path, exact in self.plan.exact.items():
            for _, child in _required(self.module, path):
                add(child.register_forward_pre_hook(lambda m, a, exact=exact: self._exact(a, exact)))
        self._hook_shards()
        for pattern, layer in self.plan.attention.items():
            for path, child in find(self.module, pattern):
                seam = _Seam(self, path, layer.streams)
                self.seams.append(seam)
                add(child.register_forward_pre_hook(seam.enter))
                add(child.register_forward_hook(seam.leave, always_call=True))

    def _hook_shards(self) -> None:
        """What comes out of sharded weights is added up, or joined along its channels."""
        axis, plan = self.tensor_axis, self.plan.tensor
        if axis.degree == 1:
            return
        for path in plan.rows:
            for _, child in find(self.module, path):
                self.handles.append(child.register_forward_hook(lambda m, a, out: total(out, axis)))
        for path in plan.joined:
            for _, child in find(self.module, path):
                hook = child.register_forward_hook(
                    lambda m, a, out: join(out, out.dim() - 1, out.shape[-1] * axis.degree, axis)
                )
                self.handles.append(hook)

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        for seam in self.seams:
            seam.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert not args, "a planned model is called by keyword"
        self.lengths.clear()
        self.given = dict(kwargs)
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

    def _exact(self, args: tuple[Any, ...], exact: dict[int, Exact]) -> tuple[Any, ...]:
        replaced = list(args)
        for position, rule in exact.items():
            value = self.given[rule.argument]
            replaced[position] = value.to(torch.promote_types(value.dtype, torch.float32)) * rule.factor
        return tuple(replaced)


class _Seam(TorchFunctionMode):
    """Gives one attention module's calls of scaled_dot_product_attention to `attend`."""

    def __init__(self, work: Application, path: str, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.work = work
        self.path = path
        self.streams = streams
        self.open = False

    def enter(self, module: nn.Module, args: Any) -> None:
        self.__enter__()
        self.open = True

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert dropout_p == 0 and not is_causal, f"{self.path}: no dropout, no causal attention here"
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        lengths = tuple(self.work.lengths[stream] for stream in self.streams)
        segment = self.work.segment
        spans = tuple(segment[stream] for stream in self.streams) if segment is not None else None
        layer = Layer(path=self.path, lengths=lengths, spans=spans, num_shards=self.work.axis.degree)
        return self.work.attend(query, key, value, layer, mask=attn_mask, scale=scale)


def _required(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    found = find(module, pattern)
    assert found, f"{type(module).__name__} has no {pattern}; the plan is for another version of diffusers"
    return found
