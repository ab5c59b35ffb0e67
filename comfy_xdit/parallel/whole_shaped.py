"""Sequence parallelism over any module: its blocks compute a rank's tokens, all code between them sees whole shapes.

Outside of the blocks every tensor has its whole size, and on each rank only the rank's own tokens mean anything: a
block's inputs are narrowed to them, its outputs are put back at their places, with zeros at the others', and nothing
is sent. So code between blocks that cuts text from image, drops a reference or adds residuals runs as it is written.
Where the last block is done, the tokens are joined. Hooks do it, for the length of a `with`.
Code that mixes tokens between the first block and the join (a mean over them) comes out wrong, and no hook can see it:
each plan needs a test against one rank.

Attention comes by an override that the model calls, at torch's function (`seam.py`), or at one that its
class calls (`function_seam.py`); it goes to `SequenceAttention`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from comfy_xdit.errors import InputError

from .attention import Attend, Layer, SequenceAttention
from .block_call import Call
from .context import ParallelContext
from .function_seam import lead_here
from .patch_tokens import PatchTokens
from .paths import find
from .seam import AttentionSeam, torchs_own
from .sequence import join
from .stage import Stage
from .stage_blocks import StageBlocks
from .stages import Absent
from .token_shards import TokenShards
from .tokens import Attention, Blocks, Rule, TokenPlan, Tokens

OVERRIDE = "optimized_attention_override"
"""Under which name ComfyUI's models look for another attention in their `transformer_options`."""

Lists = list[tuple[Blocks, list[tuple[str, nn.Module]]]]
"""Each list of blocks: its rule, and its blocks with their paths."""

KNOWN = {"scale", "enable_gqa", "transformer_options", "low_precision_attention", "_inside_attn_wrapper"}
"""What a call of the override may hold more; only the scale makes a difference here."""


@contextlib.contextmanager
def whole_shaped(
    module: nn.Module,
    plan: TokenPlan,
    context: ParallelContext,
    attend: Attend | None = None,
    stage: Stage | None = None,
) -> Iterator[WholeShaped]:
    """`module` computes with its tokens spread over `context`'s sequence axis inside the `with`.

    Every rank of the axis calls the module with the same whole arguments, and gets the whole output.
    attend: what its attention modules do, which it sees all of; by default exact sequence parallelism.
    stage: of a pipeline, where the other stages' blocks are `Absent`; the module is then called in its `forward`.
    Yields the engine, whose `attend` is the override for attention.
    Raises ValueError where the plan names what the module doesn't have, InputError where no pipeline can be made of its
    blocks; in a forward InputError for what the plan refuses, and RuntimeError, which names the module, where
    attention, a join or a block was passed by.
    """
    work = WholeShaped(module, plan, context, attend, stage)
    with torchs_own(module) if plan.is_diffusers else contextlib.nullcontext():
        try:
            work.hook()
            yield work
        finally:
            work.unhook()


class WholeShaped:
    """One plan on one module: the hooks, and this rank's shards in the forward that runs.

    patch: what forwards compute from now on; None for all. Arguments and outputs keep their whole size; of the output
    the patch's tokens alone mean anything. Attention's other keys are the method's, which must be `StaleAttention`.
    """

    def __init__(
        self, module: nn.Module, plan: TokenPlan, context: ParallelContext, method: Attend | None, stage: Stage | None
    ) -> None:
        self.module = module
        self.plan = plan
        self.axis = context.axis("sequence")
        self.sees_all = method is not None
        self.method = method or SequenceAttention(context)
        self.stage = StageBlocks(module, plan, stage) if stage is not None else None
        self.patch: PatchTokens | None = None
        self.shards = TokenShards(axis=self.axis)
        self.seams: list[AttentionSeam] = []
        self.running: list[AttentionSeam] = []
        self.in_block = False
        self.has_cut = False
        self.handed: list[Tensor] = []
        self.narrowed: dict[Rule, tuple[Any, Any]] = {}
        self.due: set[str] = set()
        self.handles: list[RemovableHandle] = []

    def hook(self) -> None:
        add = self.handles.append
        add(self.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        lists = [(rule, self._required(f"{rule.path}.*")) for rule in self.plan.blocks]
        blocks = [(number, block, rule) for number, (rule, block) in enumerate(_each(lists))]
        for number, block, rule in blocks:
            enter = self._entering(number, rule, _signature(block, rule))
            add(block.register_forward_pre_hook(enter, with_kwargs=True))
        for pattern, attention in self.plan.attention.items():
            for path, child in self._attending(pattern, attention, lists):
                seam = AttentionSeam(path, attention, self)
                self.seams.append(seam)
                if seam.is_called:
                    lead_here(child, attention.seam)
                add(child.register_forward_pre_hook(seam.enter))
                add(child.register_forward_hook(seam.leave, always_call=True))
        self._require_attention(lists)
        # After those of attention: a block may itself be the module that attends.
        for number, block, rule in blocks:
            add(block.register_forward_hook(self._leaving(number, rule, is_last=number + 1 == len(blocks))))
        for path, arguments in self.plan.join.items():
            ((_, child),) = self._required(path)
            if isinstance(arguments, Tokens):
                add(child.register_forward_hook(self._joining_output(path, arguments)))
            else:
                add(child.register_forward_pre_hook(self._joining(path, arguments), with_kwargs=True))
        add(self.module.register_forward_hook(lambda module, args, out: self._settle()))

    def _required(self, pattern: str) -> list[tuple[str, nn.Module]]:
        found = find(self.module, pattern)
        if not found:
            raise ValueError(f"{type(self.module).__name__} has no {pattern}; the plan is for another version of it")
        return found

    def _attending(self, pattern: str, rule: Attention, lists: Lists) -> list[tuple[str, nn.Module]]:
        """The modules that attend and are here; none where all blocks of their list are other stages'."""
        absent = [rule.path for rule, found in lists if all(isinstance(block, Absent) for _, block in found)]
        if pattern.startswith(tuple(f"{path}." for path in absent)):
            return []
        found = find(self.module, pattern) if rule.some else self._required(pattern)
        return [(path, child) for path, child in found if not isinstance(child, Absent)]

    def _require_attention(self, lists: Lists) -> None:
        for path, block in (pair for _, found in lists for pair in found):
            if not isinstance(block, Absent) and not any(f"{seam.path}.".startswith(f"{path}.") for seam in self.seams):
                name = type(self.module).__name__
                raise ValueError(f"{path} of {name} has no attention; the plan is for another version of it")

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        for seam in self.seams:
            seam.close()

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A forward begins. One that takes ComfyUI's options has the override in them."""
        self.shards = TokenShards(axis=self.axis, patch=self.patch)
        self.running.clear()
        self.in_block = self.has_cut = False
        self.handed.clear()
        self.narrowed.clear()
        self.due.clear()
        for seam in self.seams:
            seam.num_runs = 0
        if self.stage is not None:
            self.stage.begin()
        options = kwargs.get("transformer_options")
        if options is None:
            return args, kwargs
        assert OVERRIDE not in options, "another attention is chosen already"
        return args, {**kwargs, "transformer_options": {**options, OVERRIDE: self.attend}}

    def _settle(self) -> None:
        """The forward is over: no attention went past the engine, and nothing that was cut stays so."""
        if self.stage is not None:
            self.stage.settle()
        for seam in self.seams:
            seam.settle()
        if self.due:
            raise RuntimeError(f"the tokens were not joined after the last block, at {sorted(self.due)}")

    # A block's call.

    def _passes(self, number: int) -> bool:
        """Whether the block's inputs and outputs are of no matter here: another stage's."""
        return self.stage is not None and self.stage.passes(number)

    def _entering(self, number: int, rule: Blocks, signature: inspect.Signature) -> Callable[..., Any]:
        passes = self._passes(number)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert not self.in_block, f"a block of {rule.path} inside of another block"
            call = Call(signature, args, kwargs)
            tensors = [(call.get(name), tokens) for name, tokens in rule.given]
            is_handed = bool(self.handed)
            if is_handed:
                self._need_handed(rule, [x for x, _ in tensors])
            else:
                self.shards.learn([(x, tokens) for x, tokens in tensors if x is not None])
                self._need_enough()
            self.has_cut = self.shards.cuts
            for name, what in rule.takes.items():
                if not call.has(name) or passes or (is_handed and name in rule.gives):
                    continue
                narrow = self.shards.narrow if name in rule.gives else self._narrowed
                call.set(name, narrow(call.get(name), what))
            if self.stage is not None:
                self.stage.enter(number, [call.get(name) for name in rule.gives])
            self.in_block = not passes
            return call.bound.args, call.bound.kwargs

        return hook

    def _narrowed(self, value: Any, rule: Rule) -> Any:
        """As `TokenShards.narrow`; once for one and the same value that is given to block after block."""
        if not isinstance(value, (Tensor, tuple)):
            return self.shards.narrow(value, rule)
        known, part = self.narrowed.get(rule, (None, None))
        if known is not value:
            part = self.shards.narrow(value, rule)
            self.narrowed[rule] = value, part
        return part

    def _need_handed(self, rule: Blocks, tensors: list[Tensor | None]) -> None:
        """Raises RuntimeError where the block isn't given what the one before gave."""
        if any(x is not None and all(x is not handed for handed in self.handed) for x in tensors):
            raise RuntimeError(
                f"a block of {rule.path} is given other tensors than the one before gave; the plan says that nothing "
                "stands between them"
            )

    def _need_enough(self) -> None:
        """Too few tokens aren't worth cutting, and a shard of none breaks what infers sizes: then nothing is cut.

        Raises InputError where other streams are cut already.
        """
        name = self.shards.short
        if name is None:
            return
        if self.has_cut:
            num = self.shards.lengths[name]
            raise InputError(
                f"{num} tokens of {name} cannot be cut for the {self.axis.degree} ranks of ulysses, ring and distri; "
                f"use {num} at most"
            )
        self.shards.axis = self.axis.alone

    def _leaving(self, number: int, rule: Blocks, *, is_last: bool) -> Callable[..., Any]:
        passes, joins = self._passes(number), is_last and not self.plan.join

        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            self.in_block = False
            if self.stage is not None and not passes:
                if self.stage.ends_with(number):
                    for seam in self.seams:
                        seam.settle()
                out = self.stage.leave(number, rule, out)
            if passes or not self.shards.cuts:
                return out
            self.due = set() if joins else set(self.plan.join) or {"its output"}
            back = self.shards.joined if joins else self.shards.whole_shaped
            outs = out if isinstance(out, (tuple, list)) else (out,)
            assert len(outs) >= len(rule.gives), f"{rule.path} gives {len(outs)} outputs, not {rule.gives}"
            if self.plan.untouched and not is_last:
                self.handed = [x for x in outs[: len(rule.gives)] if x is not None]
                return out
            tokens = dict(rule.given)
            whole = [x if x is None else back(x, tokens[name]) for x, name in zip(outs, rule.gives, strict=False)]
            return type(out)([*whole, *outs[len(whole) :]]) if isinstance(out, (tuple, list)) else whole[0]

        return hook

    def _joining(self, path: str, arguments: dict[str, Tokens]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Call(inspect.signature(module.forward), args, kwargs)
            for name, tokens in arguments.items():
                call.set(name, self.shards.joined(self.shards.narrow(call.get(name), tokens), tokens))
            self.due.discard(path)
            return call.bound.args, call.bound.kwargs

        return hook

    def _joining_output(self, path: str, tokens: Tokens) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            self.due.discard(path)
            return self.shards.joined(self.shards.narrow(out, tokens), tokens)

        return hook

    # Attention.

    def attend(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: Any,
    ) -> Tensor:
        """What a model calls in place of its attention function `func`, with that function's arguments.

        q, k, v: [B, L, H · D] or [B, L, H, D], or [B, H, L, D] with skip_reshape.
        mask: [L, L], [B, L, L], or with a dim of heads.
        Returns [B, L, H · D], or [B, H, L, D] with skip_output_reshape.
        """
        seam = self.running[-1] if self.running else None
        comes_here = seam is not None and not seam.rule.is_torchs
        if comes_here and seam is not None:
            seam.count()
        if not comes_here or seam is None or not (self.shards.cuts or self.sees_all):
            shapes = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            return func(q, k, v, heads, mask=mask, attn_precision=attn_precision, **shapes, **more)
        if more.keys() - KNOWN:
            raise TypeError(f"{seam.path}: attention with {sorted(more.keys() - KNOWN)} is not known")
        if not skip_reshape:
            dim = q.shape[2:].numel() // heads
            q, k, v = (x.reshape(*x.shape[:2], -1, dim).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x for x in (k, v))
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        out = self.ask(seam, q, k, v, mask=mask, scale=more.get("scale"))
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def ask(
        self, seam: AttentionSeam, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attention of the module that runs, over its streams. Shapes as in `Attend`. Collective over the axis."""
        streams, keys = seam.streams()
        lengths, key_lengths = self.shards.of(streams), self.shards.of(keys or streams)
        if mask is not None:
            mask = self._whole_mask(mask, seam, keys or streams)
            seen = self.shards.computed(keys or streams) if seam.rule.mask == "own" else key_lengths
            fits = mask.shape[-2] in (1, sum(lengths)) and mask.shape[-1] in (1, sum(seen))
            if not fits:
                raise ValueError(f"{seam.path}: a mask of {tuple(mask.shape)} for {lengths} and {key_lengths} tokens")
            mask = mask.expand(*mask.shape[:-1], sum(seen))
        is_part = self.shards.patch is not None
        layer = Layer(
            path=seam.call,
            lengths=lengths,
            num_shards=self.shards.axis.degree,
            runs=self.shards.runs(streams) if is_part else None,
            key_lengths=None if keys is None else key_lengths,
            key_runs=self.shards.runs(keys) if is_part and keys is not None else None,
            has_own_mask=seam.rule.mask == "own",
        )
        return self.method(q, k, v, layer, mask=mask, scale=scale)

    def _whole_mask(self, mask: Tensor, seam: AttentionSeam, keys: tuple[str, ...]) -> Tensor:
        """Over the keys of all ranks, of a mask for this rank's where the plan says so. Collective then."""
        own = self.shards.own(keys)
        if seam.rule.mask == "whole" or not self.shards.cuts:
            return mask
        if mask.shape[-2] != 1 or mask.shape[-1] != sum(own):
            raise ValueError(f"{seam.path}: a mask of {tuple(mask.shape)} on a rank that holds {own} keys")
        parts = zip(mask.split(own, -1), self.shards.computed(keys), strict=True)
        return torch.cat([join(part, part.ndim - 1, num, self.shards.axis) for part, num in parts], -1)


def _each(lists: Lists) -> Iterator[tuple[Blocks, nn.Module]]:
    """The blocks in the plan's order, and their rules."""
    for rule, found in lists:
        for _, block in found:
            yield rule, block


def _signature(block: nn.Module, rule: Blocks) -> inspect.Signature:
    """Of the block's forward. Raises ValueError where it doesn't take what the plan says."""
    signature = block.signature if isinstance(block, Absent) else inspect.signature(block.forward)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = {name.partition(".")[0] for name in rule.takes} - signature.parameters.keys()
    if unknown and not takes_any:
        raise ValueError(f"{type(block).__name__} takes no {sorted(unknown)}; the plan is for another version of it")
    return signature
