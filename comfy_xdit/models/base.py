"""What one family of diffusion transformers declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from comfy_xdit.models.given import check_call
from comfy_xdit.parallel.latent_tokens import LatentTokens, StreamSizes
from comfy_xdit.parallel.model import Call
from comfy_xdit.parallel.rows import batched, rows_of
from comfy_xdit.parallel.spec import ModelShape
from comfy_xdit.parallel.tokens import TokenPlan
from comfy_xdit.weights.slices import Infos, Table

Config = dict[str, Any]
"""Keyword arguments of the diffusers model class."""

@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family are recognised, loaded and called.

    name: what messages say; title: what people say.
    keys, diffusers_keys: weights that tell the family from all others, in ComfyUI's and in diffusers' layout.
    config(infos): arguments of the model, all read from the shapes of ComfyUI's layout; InputError when these
    disagree. infos never have the checkpoint's prefix.
    model_class(): the diffusers class, imported only when asked for.
    table(infos): in either layout → where each weight of ComfyUI's layout lies in the diffusers model.
    inputs(config, call): keyword arguments of the diffusers forward.
    output(out, call): what ComfyUI's own model would have returned; out is the diffusers model's tensor.
    output_channels(config, call): how many channels that has.
    plan: what is cut, where, and where it is joined again. Its streams are "image", which begins with the latent's
    tokens, and "text", if blocks change it.
    token_side: latent pixels on a side of an image token.
    after_blocks: modules with weights that run after the last block, so on the last stage only.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    diffusers_keys: tuple[str, ...]
    config: Callable[[Infos], Config]
    model_class: Callable[[], type]
    table: Callable[[Infos], Table]
    inputs: Callable[[Config, Call], dict[str, Any]]
    output: Callable[[Tensor, Call], Tensor]
    output_channels: Callable[[Config, Call], int]
    plan: TokenPlan
    token_side: int = 2
    after_blocks: tuple[str, ...] = ("norm_out", "proj_out")

    def shape(self, config: Config) -> ModelShape:
        """What limits the degrees of a model with this config."""
        num_blocks = config["num_layers"] + config.get("num_single_layers", 0)
        return ModelShape(title=self.title, num_heads=config["num_attention_heads"], num_blocks=num_blocks)

    def arguments(self, model: Any, call: Call) -> dict[str, Any]:
        """What the diffusers model is given for a call. Raises InputError for what it does not take."""
        return self.inputs(dict(model.module.config), call)

    # As `parallel.patch_engine.PatchFamily` says.

    def latent_tokens(self, module: nn.Module, call: Call) -> LatentTokens:
        return LatentTokens.of(call["x"], "image", side=self.token_side)

    def stream_sizes(self, module: Any, call: Call) -> StreamSizes:
        streams = {stream for blocks in self.plan.blocks for _, rule in blocks.given for stream in rule.streams}
        images = [call["x"], *(call.get("ref_latents") or [])]
        lengths = {"image": sum(self.latent_tokens(module, {"x": x}).grid.num_tokens for x in images)}
        if "text" in streams:
            lengths["text"] = call["context"].shape[1]
        config = module.config
        return StreamSizes(lengths=lengths, width=config["num_attention_heads"] * config["attention_head_dim"])

    # As `parallel.model.Family` says.

    def call_of(self, x: Tensor, timestep: Tensor, cond: Call) -> Call:
        return {**cond, "x": x, "timestep": timestep}

    def check(self, model: Any, call: Call) -> None:
        check_call(self.title, call, model.compute_dtype)
        self.arguments(model, self.of_rows(call, range(1)))

    def of_rows(self, call: Call, rows: range) -> Call:
        cut: Call = rows_of(call, rows)
        return cut

    def batched(self, calls: list[Call]) -> Call | None:
        return batched(calls)

    def run(self, model: Any, call: Call) -> Tensor:
        return self.output(model.module(**self.arguments(model, call), return_dict=False)[0], call)

    def output_shape(self, model: Any, call: Call) -> tuple[int, ...]:
        x = call["x"]
        return (x.shape[0], self.output_channels(dict(model.module.config), call), *x.shape[2:])
