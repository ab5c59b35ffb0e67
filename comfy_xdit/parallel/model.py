"""What the engine needs of a model: how its calls are looked at, cut into rows, and run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .spec import ModelShape

if TYPE_CHECKING:
    from .tokens import TokenPlan

Call = dict[str, Any]
"""One call of ComfyUI's diffusion model: x, timestep, context, and what else `messages.Denoise` lists."""


class Family(Protocol):
    """How calls of a kind of models are looked at, cut into rows, and run.

    title: what people say. plan: what is cut, where, and where it is joined again.
    """

    @property
    def title(self) -> str: ...
    @property
    def plan(self) -> TokenPlan: ...

    def call_of(self, x: Tensor, timestep: Tensor, cond: Call) -> Call:
        """The call for a sampler's latent, in the model's dtype, and a conditioning of `messages.Sample`."""

    def check(self, model: Any, call: Call) -> None:
        """Raises InputError for what the model does not take. To see it no rank computes."""

    def of_rows(self, call: Call, rows: range) -> Call:
        """The call of some of its rows."""

    def batched(self, calls: list[Call]) -> Call | None:
        """The calls as one; None where they can't be."""

    def run(self, model: Any, call: Call) -> Tensor:
        """What ComfyUI's own model gives for the call; several latents as one tensor."""

    def output_shape(self, model: Any, call: Call) -> tuple[int, ...]:
        """Of what `run` gives, whose first dim is the rows: ranks that have not run the call know it."""


class Model(Protocol):
    """What `denoise` needs of a resident model."""

    @property
    def family(self) -> Family: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def shape(self) -> ModelShape: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...


def first_latent(call: Call) -> Tensor:
    """The latent, or the first of several."""
    x = call["x"]
    return x if isinstance(x, Tensor) else x[0]


def num_rows(call: Call) -> int:
    """How many rows the batch of a call has."""
    return first_latent(call).shape[0]


def loop_dtype(model: Model) -> torch.dtype:
    """What the sampler's state is kept in: fp32 as on the host; fp64 for a model that computes in it."""
    return torch.promote_types(model.compute_dtype, torch.float32)


def calls_argument(x: Tensor, timestep: float, cond: Call, model: Model) -> Call:
    """One call as ComfyUI would make it: the latent in the model's dtype, the timestep in fp32."""
    steps = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
    return model.family.call_of(x.to(model.compute_dtype), steps, cond)
