"""One forward of a model: what its lists of blocks are given and give, and what their attention sees."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from comfy_xdit.native.selftest import run
from comfy_xdit.native.subject import Call as Arguments
from comfy_xdit.parallel.block_call import Call
from comfy_xdit.parallel.whole_shaped import OVERRIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
    """One attention: the innermost module that ran, its heads, which queries and keys are NaN, and its mask.

    seam: how it was reached, as `parallel.tokens.Attention` has it.
    """

    path: str
    heads: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    seam: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What one forward showed of the first block of each list, lists in the order in which they began to run.

    given: list → argument ("x", or "x.0" of several) → value. gave: list → its outputs. num_blocks: of every list.
    attended: list → attention in that block.
    """

    given: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    gave: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    num_blocks: dict[str, int] = dataclasses.field(default_factory=dict)
    attended: dict[str, list[Attended]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Poison:
    """NaN in place of an argument of a list's first block, or of an output of its last one."""

    blocks: str
    argument: str = ""
    output: int | None = None


def watch(model: nn.Module, call: Arguments, poison: Poison | None = None) -> Seen:
    """One evaluation of `call`. Raises what the model raises."""
    work = _Watch(poison)
    with torch.inference_mode(), work.on(model):
        run(model, call)
    return work.seen


class _Watch(TorchFunctionMode):
    def __init__(self, poison: Poison | None) -> None:
        super().__init__()
        self.seen = Seen()
        self._poison = poison
        self._running: list[str] = []
        self._in_override = False

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = [model.register_forward_pre_hook(self._starts, with_kwargs=True)]
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._begins(path)))
            handles.append(module.register_forward_hook(self._ends, always_call=True))
        for owner, blocks in _lists(model):
            self.seen.num_blocks[owner] = len(blocks)
            handles.append(blocks[0].register_forward_pre_hook(self._enters(owner, blocks[0]), with_kwargs=True))
            handles.append(blocks[0].register_forward_hook(self._leaves(owner)))
            handles.append(blocks[-1].register_forward_hook(self._spoils(owner)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _starts(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        options = {**kwargs["transformer_options"], OVERRIDE: self.override}
        return args, {**kwargs, "transformer_options": options}

    def _begins(self, path: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(path)

    def _ends(self, module: nn.Module, args: Any, out: Any) -> None:
        self._running.pop()

    def _enters(self, owner: str, block: nn.Module) -> Callable[..., Any]:
        signature = inspect.signature(block.forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Call(signature, args, kwargs)
            if owner not in self.seen.given:
                self.seen.given[owner] = {path: _kept(call.get(path)) for path in _paths(call)}
                self.seen.attended[owner] = []
            poison = self._poison
            if poison is not None and poison.blocks == owner and poison.argument:
                call.set(poison.argument, torch.full_like(call.get(poison.argument), torch.nan))
            return call.bound.args, call.bound.kwargs

        return hook

    def _leaves(self, owner: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            outs = out if isinstance(out, (tuple, list)) else (out,)
            self.seen.gave.setdefault(owner, [_kept(one) for one in outs])

        return hook

    def _spoils(self, owner: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            poison = self._poison
            if poison is None or poison.blocks != owner or poison.output is None:
                return out
            outs = list(out) if isinstance(out, (tuple, list)) else [out]
            outs[poison.output] = torch.full_like(outs[poison.output], torch.nan)
            return type(out)(outs) if isinstance(out, (tuple, list)) else outs[0]

        return hook

    def override(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
        """Stands at ComfyUI's attention: notes it, and lets it attend."""
        mask = more.get("mask", args[0] if args else None)
        is_split = bool(more.get("skip_reshape"))
        q_BHLD, k_BHLD = (x if is_split else x.reshape(*x.shape[:2], -1)[:, None] for x in (q, k))
        self._note(q_BHLD, k_BHLD, heads, mask, "override")
        self._in_override = True
        try:
            return func(q, k, v, heads, *args, **more)  # type: ignore[no-any-return]
        finally:
            self._in_override = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not self._in_override:
            self._note(args[0], args[1], args[0].shape[1], (kwargs or {}).get("attn_mask"), "sdpa")
        return func(*args, **(kwargs or {}))

    def _note(self, q_BHLD: Tensor, k_BHLD: Tensor, heads: int, mask: Tensor | None, seam: str) -> None:
        path = self._running[-1]
        for owner, found in self.seen.attended.items():
            if path == f"{owner}.0" or path.startswith(f"{owner}.0."):
                rows = [x[0].isnan().any(-1).any(0) for x in (q_BHLD, k_BHLD)]
                found.append(
                    Attended(path=path, heads=heads, queries=rows[0], keys=rows[1], mask=mask, seam=seam)
                )


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of blocks, but for those inside of a block."""
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not path.startswith(tuple(f"{at}." for at in found)):
            found.append(path)
            yield path, list(module)


def _paths(call: Call) -> list[str]:
    """Names of the arguments; of several tensors in a tuple or list, of each."""
    names = []
    for name, value in call.named().items():
        is_several = isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(x, Tensor) for x in value)
        names += [f"{name}.{i}" for i in range(len(value))] if is_several else [name]
    return [name for name in names if name != "transformer_options"]


def _kept(value: Any) -> Any:
    """Blocks may write into what they are given."""
    return value.clone() if isinstance(value, Tensor) else value
