"""What one family of ComfyUI's own model classes declares."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.model import Call, first_latent, num_rows
from comfy_xdit.parallel.rows import batched
from comfy_xdit.parallel.spec import ModelShape
from comfy_xdit.parallel.tokens import TokenPlan
from comfy_xdit.quoted import quoted

from .calls import as_given, packed, rows_of, unpacked

OF_THE_LATENT = ("concat", "latent_shapes")
"""Parts of a conditioning in `messages.Sample` that say how the transformer's x is made of the sampler's latent."""

MISFITS = ("shapes cannot be multiplied", "normalized_shape")
"""What torch says of an input of other channels than the layer that reads it has."""

METHODS = ("dp", "cfg", "distri", "ring", "ulysses")
"""The parallel methods that there are for all of these models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComfyFamily:
    """How ComfyUI's own models of a family run on several ranks.

    name: what commands say; title: what people say.
    kinds: names of ComfyUI's configuration classes (`comfy.supported_models`) of these models.
    plan: where tokens are cut, and where they are joined.
    num_heads(transformer): attention heads; of several kinds of attention the fewest.
    rows: the transformer's arguments, beside x and the timestep, with an entry for each row of the batch along dim 0
    (or one for all): tensors, or lists of them. constants: those that are the same for all rows.
    Any other argument is refused by name: nobody has shown that it comes out right.
    options: entries of transformer_options that the transformer's own code reads.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    plan: TokenPlan
    num_heads: Callable[[Any], int]
    rows: tuple[str, ...]
    constants: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def shape(self, transformer: nn.Module) -> ModelShape:
        """What limits the degrees of this model; it may be one without weights."""
        num_blocks = sum(len(list(transformer.get_submodule(blocks.path).children())) for blocks in self.plan.blocks)
        heads = self.num_heads(transformer)
        methods = (*METHODS, "pipe") if self.plan.in_order else METHODS
        return ModelShape(title=self.title, num_heads=heads, num_blocks=num_blocks, methods=methods)

    def check_arguments(self, call: Call) -> None:
        """Raises InputError, naming it, for an argument that these models can't be given on a pool."""
        for name in call.keys() - {"x", "timestep", "transformer_options", *self.rows, *self.constants}:
            raise InputError(
                f"{self.title} can't be given {name!r} on the pool; remove the node that adds it, or sample without "
                "Parallel Model (xDiT)"
            )
        for name in call.get("transformer_options", {}).keys() - {*self.options}:
            raise InputError(f"{self.title} can't be given the transformer option {name!r} on the pool")
        self.of_rows(call, range(1))

    # As `parallel.model.Family` says; `model` is a `ComfyModel`.

    def call_of(self, x: Tensor, timestep: Tensor, cond: Call) -> Call:
        made: Call = {name: value for name, value in cond.items() if name not in OF_THE_LATENT}
        if "concat" in cond:
            x = torch.cat([x, cond["concat"]], 1)
        return {**made, "x": unpacked(x, cond["latent_shapes"]) if "latent_shapes" in cond else x, "timestep": timestep}

    def check(self, model: Any, call: Call) -> None:
        self.check_arguments(call)
        dtype = first_latent(call).dtype
        if dtype != model.compute_dtype:
            raise InputError(f"{self.title} got a latent of {dtype}, and computes in {model.compute_dtype}")

    def of_rows(self, call: Call, rows: range) -> Call:
        batch = num_rows(call)
        cut = ("x", "timestep", *self.rows)
        return {name: rows_of(name, value, rows, batch) if name in cut else value for name, value in call.items()}

    def batched(self, calls: list[Call]) -> Call | None:
        return batched(calls, self.constants)

    def run(self, model: Any, call: Call) -> Tensor:
        # New lists and dicts: models write into them.
        named = {name: as_given(value) for name, value in call.items()}
        # What is None does not travel, but a class may ask for it.
        given = {**dict.fromkeys(_required(model.module)), "transformer_options": {}, **named}
        try:
            output = packed(model.module(given.pop("x"), given.pop("timestep"), **given))
        except RuntimeError as error:
            if not any(words in str(error) for words in MISFITS):
                raise
            raise InputError(
                f"{self.title} can't take what it is given ({quoted(error)}); use the text encoders, the empty latent "
                "and the VAE that belong to the model"
            ) from error
        shape = self.output_shape(model, call)
        if output.shape != shape or output.dtype != model.compute_dtype:
            raise RuntimeError(f"{self.title} gave {tuple(output.shape)} of {output.dtype}, not {shape}")
        return output

    def output_shape(self, model: Any, call: Call) -> tuple[int, ...]:
        x = call["x"]
        if isinstance(x, Tensor):
            return (x.shape[0], model.num_channels, *x.shape[2:])
        return (num_rows(call), 1, sum(math.prod(part.shape[1:]) for part in x))


def _required(module: nn.Module) -> list[str]:
    """Arguments of the module's forward, after the first two, that have no default."""
    _, _, *rest = inspect.signature(module.forward).parameters.values()
    return [one.name for one in rest if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty]
