"""What one family of ComfyUI's own model classes declares."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.latent_tokens import LatentTokens
from comfy_xdit.parallel.model import Call, first_latent, num_rows
from comfy_xdit.parallel.spec import ModelShape
from comfy_xdit.parallel.tensor import common_divisor, layers_cut
from comfy_xdit.parallel.tokens import TokenPlan
from comfy_xdit.quoted import quoted

from .calls import Apart, alike, as_given, joined, packed, rows_of, unpacked

OF_THE_STEP = ("concat", "latent_shapes", "timesteps")
"""Parts of a conditioning in `messages.Sample` that say how the transformer's arguments are made of a step's latent and
timestep."""

MISFITS = ("shapes cannot be multiplied", "normalized_shape")
"""What torch says of an input of other channels than the layer that reads it has."""

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights are made of that tensor parallel cuts: of others nobody has shown that a part is a part."""

METHODS = ("dp", "cfg", "distri", "ring", "ulysses")
"""The parallel methods that there are for all of these models."""


Latent = Callable[[Any, Call], "LatentTokens | None"]
"""Where the tokens of a call's lone latent stand; of a transformer, which may be one without weights, and a call."""


def first_of(stream: str, side: Callable[[Any], int], *, unless: str = "") -> Latent:
    """Latents whose tokens are the first of `stream`; where the argument `unless` is given nobody knows.

    side(transformer): latent pixels on a side of a token.
    """

    def latent(transformer: Any, call: Call) -> LatentTokens | None:
        return None if call.get(unless) is not None else LatentTokens.of(call["x"], stream, side=side(transformer))

    return latent


def _patch(transformer: Any) -> tuple[int, ...]:
    size = getattr(transformer, "patch_size", 1)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (1, *sides)[-3:]


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
    options: entries of transformer_options that the transformer's own code reads. options_need: the part of it that
    reads them, which may be None; "": it always does.
    patch(transformer): of how many frames, rows and columns of a latent one token is made. text_tokens: of a usual
    prompt, as its text encoders pad it.
    prepares: methods of the transformer that ComfyUI's model has work on conditioning before sampling. They run on the
    workers, on each rank whole.
    rebuilt: entries of arguments, as "argument.entry", that the transformer makes of the others where they are missing.
    They don't travel.
    scales: entries, named so too, by which the transformer's `forward` scales latents around its `_forward`, each step
    otherwise. In ComfyUI's own loop that is done there, and they don't travel.
    max_rows: how many a forward takes; 0 for any number.
    latent: where PipeFusion finds the latent's tokens; None where nobody knows, or it can't cut them. Only for
    transformers that make each token's part of the output of that token, and of no part of x itself.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    plan: TokenPlan
    num_heads: Callable[[Any], int]
    rows: tuple[str, ...]
    constants: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    options_need: str = ""
    patch: Callable[[Any], tuple[int, ...]] = _patch
    text_tokens: int = 256
    prepares: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    max_rows: int = 0
    latent: Latent | None = None

    def shape(self, transformer: nn.Module, *, is_quantised: bool = False) -> ModelShape:
        """What limits the degrees of this model; it may be one without weights.

        is_quantised: whether a layer is, where its weights don't show it.
        """
        num_blocks = sum(len(list(transformer.get_submodule(blocks.path).children())) for blocks in self.plan.blocks)
        divides = 0 if is_quantised else self._tensor_divides(transformer)
        return ModelShape(
            title=self.title,
            num_heads=self.num_heads(transformer),
            num_blocks=num_blocks,
            methods=(*METHODS, *("pipe",) * self.plan.in_order, *("tensor",) * (divides > 0)),
            tensor_divides=divides,
        )

    def _tensor_divides(self, transformer: nn.Module) -> int:
        """What a degree of tensor must divide; 0 where the weights aren't plain, or others than the plan knows."""
        plan = self.plan.tensor
        if plan is None:
            return 0
        try:
            is_plain = all(map(_is_plain, layers_cut(transformer, plan)))
            return common_divisor(transformer, plan) if is_plain else 0
        except ValueError:
            return 0

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
        if 0 < self.max_rows < num_rows(call):
            raise InputError(f"{self.title} takes a batch of {self.max_rows}, not of {num_rows(call)}")

    def options_of(self, transformer: nn.Module) -> tuple[str, ...]:
        """Those that this one reads; it may be one without weights."""
        is_idle = self.options_need and getattr(transformer, self.options_need) is None
        return () if is_idle else self.options

    def latent_tokens(self, transformer: nn.Module, call: Call) -> LatentTokens | None:
        """Where the tokens of the call's latent stand; None where PipeFusion can't cut them.

        The transformer may be one without weights.
        """
        return self.latent(transformer, call) if self.latent is not None and isinstance(call["x"], Tensor) else None

    def stream_sizes(self, transformer: nn.Module, call: Call) -> None:
        """Only a forward knows."""

    # As `parallel.model.Family` says; `model` is a `ComfyModel`.

    def call_of(self, x: Tensor, timestep: Tensor, cond: Call) -> Call:
        made: Call = {name: value for name, value in cond.items() if name not in OF_THE_STEP}
        if "concat" in cond:
            x = torch.cat([x, cond["concat"]], 1)
        made["x"] = unpacked(x, cond["latent_shapes"]) if "latent_shapes" in cond else x
        return {**made, **dict.fromkeys(["timestep", *cond.get("timesteps", ())], timestep)}

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
        first, *rest = calls
        rows = num_rows(first)
        if not rest or (self.max_rows and rows * len(calls) > self.max_rows):
            return None
        if any(call.keys() != first.keys() or num_rows(call) != rows for call in rest):
            return None
        made: Call = {}
        try:
            for name in first:
                values = [call[name] for call in calls]
                if name in ("x", "timestep", *self.rows):
                    made[name] = joined(values, rows)
                elif all(alike(value, values[0]) for value in values):
                    made[name] = values[0]
                else:
                    return None
        except Apart:
            return None
        return made

    def run(self, model: Any, call: Call) -> Tensor:
        # New lists and dicts: models write into them.
        named = {name: as_given(value) for name, value in call.items()}
        # What is None does not travel, but a class may ask for it.
        given = {**dict.fromkeys(_required(model.module)), "transformer_options": {}, **named}
        with self._misfits_said():
            output = packed(model.module(given.pop("x"), given.pop("timestep"), **given))
        shape = self.output_shape(model, call)
        if output.shape != shape or output.dtype != model.compute_dtype:
            raise RuntimeError(f"{self.title} gave {tuple(output.shape)} of {output.dtype}, not {shape}")
        return output

    def prepare(self, model: Any, method: str, args: list[Any], named: dict[str, Any]) -> Any:
        """What the transformer's `method` makes of conditioning. `model` is a `ComfyModel`.

        Raises InputError for a method that the family does not name, and for conditioning of another model.
        """
        if method not in self.prepares:
            raise InputError(f"{self.title} can't be asked for {method!r} on the pool; sample it without the pool")
        with self._misfits_said():
            return getattr(model.module, method)(*args, **named)

    @contextlib.contextmanager
    def _misfits_said(self) -> Iterator[None]:
        """Raises InputError for what torch says of inputs of another model."""
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error) for words in MISFITS):
                raise
            raise InputError(
                f"{self.title} can't take what it is given ({quoted(error)}); use the text encoders, the empty latent "
                "and the VAE that belong to the model"
            ) from error

    def output_shape(self, model: Any, call: Call) -> tuple[int, ...]:
        x = call["x"]
        if isinstance(x, Tensor):
            return (x.shape[0], model.num_channels, *x.shape[2:])
        return (num_rows(call), 1, sum(math.prod(part.shape[1:]) for part in x))


def _is_plain(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if weight is None:
        # Made when it is loaded.
        return getattr(layer, "weight_comfy_model_dtype", None) in (None, *PLAIN)
    return type(weight.data) is Tensor and weight.dtype in PLAIN


def _required(module: nn.Module) -> list[str]:
    """Arguments of the module's forward, after the first two, that have no default."""
    _, _, *rest = inspect.signature(module.forward).parameters.values()
    return [one.name for one in rest if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty]
