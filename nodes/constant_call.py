"""What the network is given beside the latent and the time: the same in every step, so it goes once.

The host's own code makes it: it is asked to evaluate each conditioning, and the call is caught where
it would leave for the workers.
"""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy_xdit_nodes.native.remote import ComfyRemoteModel
from torch import Tensor

from comfy_xdit.native.calls import packed, shapes_of
from comfy_xdit.sampler_recorder import NotAProgram
from comfy_xdit.trajectory import SamplerCall, SamplerProgram

NEAR = {"x": 1e-2, "timestep": 1e-6}
"""What moves, and how well the program must predict it, of its largest value. bfloat16 rounds x to 0.4 %."""


class Catcher:
    """Stands in for a sampling run on the pool: keeps its calls, answers zeros."""

    meeting = None
    is_whole = True

    def __init__(self, x: Tensor) -> None:
        """x: of the sampler's latent's shape."""
        self.calls: list[dict[str, Any]] = []
        self._x = x

    def evaluate(self, call: dict[str, Any], chunks: int) -> Tensor:
        self.calls.append(call)
        return torch.zeros_like(self._x)


def constant_calls(
    guider: Any, program: SamplerProgram, noise: Tensor, model_options: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each of the program's conditionings, the network's arguments but for "x" and "timestep".

    guider: as in its `inner_sample`, of a model on the pool; inside the pool's lease. noise: of the
    latent's shape. Tensors have the latent's batch. Raises NotAProgram when a program's numbers don't say
    what the network is given: when the host adds channels to the latent, or changes arguments by step.
    """
    first, last = program.calls[0], program.calls[-1]
    made = []
    for name in program.conds:
        constant = _caught(guider, name, first, noise, model_options)
        if not _same(constant, _caught(guider, name, last, noise * 0.5, model_options)):
            raise NotAProgram(f"the network's arguments for the {name} conditioning change with the step")
        made.append(constant)
    return made


def _caught(guider: Any, name: str, call: SamplerCall, x: Tensor, model_options: dict[str, Any]) -> dict[str, Any]:
    model = guider.inner_model
    sigma = torch.full((x.shape[0],), call.sigma, dtype=torch.float32, device=x.device)
    options = comfy.model_patcher.create_model_options_clone(model_options)
    with model.remote.answered_by(Catcher(x)) as catcher:
        comfy.samplers.calc_cond_batch(model, [guider.conds[name]], x, sigma, options)
    if len(catcher.calls) != 1:
        raise NotAProgram(f"the host evaluates the {name} conditioning in {len(catcher.calls)} calls")
    caught = dict(catcher.calls[0])
    if isinstance(model.remote, ComfyRemoteModel):
        caught |= _made_of_the_latent(caught["x"], x.shape) | _made_of_the_timestep(caught)
        caught = {name: value for name, value in caught.items() if name not in caught.get("timesteps", ())}
    foreseen = {
        "x": model.model_sampling.calculate_input(sigma, x),
        "timestep": torch.full_like(sigma, call.timestep),
    }
    for part, expected in foreseen.items():
        got = caught.pop(part)
        if not isinstance(got, Tensor) or got.shape != expected.shape or not _near(part, got, expected):
            raise NotAProgram("the host prepares the network's input in a way that the program does not know")
    return caught


def _near(part: str, got: Tensor, expected: Tensor) -> bool:
    return bool((got.float() - expected).abs().max() <= NEAR[part] * expected.abs().max())


def _made_of_the_latent(given: Any, shape: torch.Size) -> dict[str, Any]:
    """How the network's input is made of a latent of this shape, and that latent, as "x"."""
    if isinstance(given, list):
        return {"x": packed(given), "latent_shapes": shapes_of(given)}
    if given.dim() == len(shape) and given.shape[1] > shape[1]:
        return {"x": given[:, : shape[1]], "concat": given[:, shape[1] :]}
    return {"x": given}


def _made_of_the_timestep(caught: dict[str, Any]) -> dict[str, Any]:
    """Which other arguments are the timestep, as "timesteps"."""
    names = [name for name, value in caught.items() if name != "timestep" and _same(value, caught["timestep"])]
    return {"timesteps": names} if names else {}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b
