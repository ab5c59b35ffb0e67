"""What DistriFusion means, worked out in one process: a plain diffusers model, its ranks run one after another.

An evaluation is exact when every rank's keys meet every other's. Run one after another, the ranks can't wait
for each other; instead all of them run again and again with the keys of the pass before, until nothing
changes: the first layer's keys are right after one pass, the second's after two, and so on.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ranks import tiny_model
from torch import Tensor

from comfy_xdit.trajectory import Replay, SamplerProgram

Seen = dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]]
"""(layer, rank) → queries, keys and values of the rank's tokens: [batch, heads, tokens, head dim]."""


class _Enough(Exception):
    """The forward has come to what is being looked for."""


class Emulation:
    """A model on `groups` of `inner` ranks each: fresh keys within a group, old ones between groups."""

    def __init__(self, model: dict[str, Any], *, groups: int, inner: int = 1) -> None:
        self.model = tiny_model(**model)
        self.groups, self.inner = groups, inner
        self.before: dict[Any, Seen] = {}

    def evaluate(self, call: dict[str, Any], kind: Any, *, exact: bool) -> Tensor:
        """The model's output. kind: what tells calls apart whose keys have nothing to do with each other."""
        arguments = self.model.family.inputs(dict(self.model.module.config), call)
        before = None if exact else self.before.get(kind)
        seen: Seen = {}
        while True:
            passes = [self._shard(arguments, rank, seen, before) for rank in range(self.groups * self.inner)]
            now = {place: tensors for _, found in passes for place, tensors in found.items()}
            settled = seen.keys() == now.keys() and all(
                torch.equal(old, new) for place in now for old, new in zip(seen[place], now[place], strict=True)
            )
            if settled:
                break
            seen = now
        self.before[kind] = seen
        return self.model.family.output(self._end(arguments, torch.cat([out for out, _ in passes], 1)), call)

    def _shard(self, arguments: dict[str, Any], rank: int, seen: Seen, before: Seen | None) -> tuple[Tensor, Seen]:
        """Rank `rank`'s part of the model's last layer, and its queries, keys and values."""
        module = self.model.module
        num_ranks = self.groups * self.inner
        path, last, found = "", [], {}
        # PixArt's blocks change no text, so nobody cuts it.
        has_whole_text = self.model.family.name == "pixart"

        def mine(x: Tensor, dim: int) -> Tensor:
            return x.tensor_split(num_ranks, dim)[rank].contiguous()

        def others(peer: int) -> tuple[Tensor, Tensor, Tensor]:
            fresh = before is None or peer // self.inner == rank // self.inner
            return (seen if fresh else before).get((path, peer), found[path, rank])

        def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **_: Any) -> Tensor:
            if has_whole_text and path.endswith("attn2"):
                return plain(query, key, value, scale=scale)
            found[path, rank] = (query, key, value)
            sources = [found[path, rank] if peer == rank else others(peer) for peer in range(num_ranks)]
            first = rank // self.inner * self.inner
            # The whole group's queries, as they are after an all-to-all: kernels round by their number.
            queries = torch.cat([source[0] for source in sources[first : first + self.inner]], 2)
            keys, values = (torch.cat([source[i] for source in sources], 2) for i in (1, 2))
            start = sum(source[0].shape[2] for source in sources[first:rank])
            return plain(queries, keys, values, scale=scale)[:, :, start : start + query.shape[2]]

        def enter(name: str) -> Any:
            def hook(*_: Any) -> None:
                nonlocal path
                path = name

            return hook

        def stop(module: Any, args: Any, out: Tensor) -> None:
            last.append(out)
            raise _Enough

        cut = dict(arguments)
        for name, dim in (("encoder_hidden_states", 1), ("txt_ids", 0), ("img_ids", 0)):
            if name in cut and not has_whole_text:
                cut[name] = mine(cut[name], dim)
        handles = [
            child.register_forward_pre_hook(enter(name))
            for name, child in module.named_modules()
            if hasattr(child, "to_q")
        ]
        handles.append(module.proj_out.register_forward_hook(stop))
        if hasattr(module, "pos_embed") and "img_ids" not in cut:
            handles.append(module.pos_embed.register_forward_hook(lambda m, a, out: mine(out, 1)))
        else:
            cut["hidden_states"] = mine(cut["hidden_states"], 1)
        plain = F.scaled_dot_product_attention
        try:
            with mock.patch.object(F, "scaled_dot_product_attention", attention), torch.inference_mode():
                module(**cut)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return last[0], found

    def _end(self, arguments: dict[str, Any], joined: Tensor) -> Tensor:
        """What the model makes of its last layer's output."""
        handle = self.model.module.proj_out.register_forward_hook(lambda m, a, out: joined)
        try:
            with torch.inference_mode():
                return self.model.module(**arguments, return_dict=False)[0]
        finally:
            handle.remove()


def emulate(
    model: dict[str, Any],
    program: SamplerProgram,
    *,
    noise: Tensor,
    latent: Tensor,
    noises: list[Tensor | None],
    conds: list[dict[str, Any]],
    groups: int,
    inner: int = 1,
    warmup_steps: int,
    together: bool,
) -> Tensor:
    """The samples of a whole run. together: all conditionings are one batch, else a call each."""
    emulation = Emulation(model, groups=groups, inner=inner)
    replay = Replay(program, noise=noise, latent=latent, noises=noises, dtype=noise.dtype)
    for number, call in enumerate(program.calls):
        x = replay.model_input(number)
        timestep = torch.full((x.shape[0],), call.timestep)
        calls = [{**conds[index], "x": x, "timestep": timestep} for index in call.conds]
        if together:
            whole = {name: torch.cat([each[name] for each in calls]) for name in calls[0]}
            outputs = emulation.evaluate(whole, "all", exact=number < warmup_steps).chunk(len(calls))
        else:
            outputs = [
                emulation.evaluate(each, index, exact=number < warmup_steps)
                for index, each in zip(call.conds, calls, strict=True)
            ]
        replay.answer(number, list(outputs))
    return replay.output()
