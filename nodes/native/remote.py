"""The call that leaves ComfyUI for a model of its own class on the workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy_xdit_nodes.native.call import as_call
from comfy_xdit_nodes.remote import RemoteModel
from torch import Tensor

from comfy_xdit.errors import InputError
from comfy_xdit.native.calls import shapes_of, unpacked
from comfy_xdit.native.family import ComfyFamily


class ComfyRemoteModel(RemoteModel):
    """As `RemoteModel`, with the arguments of ComfyUI's own transformer as they are."""

    def __init__(self, family: ComfyFamily) -> None:
        super().__init__()
        self._family = family
        self._options = family.options

    def stand_in(self, transformer: Any) -> None:
        """As the base says; and what the family has its transformer do beside evaluations."""
        super().stand_in(transformer)
        self._options = self._family.options_of(transformer)
        for method in self._family.prepares:
            setattr(transformer, method, partial(self._prepare, method))
        if self._family.scales:
            transformer.forward = partial(self._scaled, transformer.forward)

    def _prepare(self, method: str, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the transformer's `method` makes of `value`, on its device."""
        return self._needed_run().prepare(method, [value, *args], kwargs).to(value.device)

    def _scaled(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The transformer's `forward`, which scales around `_forward`; a run of the workers' scales there."""
        return self(*args, **kwargs) if self._needed_run().is_whole else forward(*args, **kwargs)

    def _arguments(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bound = self._bound(*args, **kwargs)
        x, timestep = (bound.pop(name) for name in list(bound)[:2])
        options = bound.get("transformer_options") or {}
        is_whole = self._needed_run().is_whole
        for path in (*self._family.rebuilt, *(() if is_whole else self._family.scales)):
            name, entry = path.split(".")
            if isinstance(bound.get(name), dict):
                bound[name] = {key: value for key, value in bound[name].items() if key != entry}
        call = as_call(x, timestep, own=self._options, **bound)
        if "control" in call:
            raise ValueError("a ControlNet can't run on the pool yet; use the stock sampler for it")
        try:
            self._family.check_arguments(call)
        except InputError as error:
            raise ValueError(str(error)) from None
        return call, options

    def has_patches(self, transformer: Any, noise: Tensor, conds: list[dict[str, Any]]) -> bool:
        # Channels that are added to it may be on another device.
        conds = [{name: value for name, value in cond.items() if name != "concat"} for cond in conds]
        calls = [self._family.call_of(noise, noise.new_zeros(noise.shape[0]), cond) for cond in conds]
        return all(self._family.latent_tokens(transformer, call) is not None for call in calls)

    def _given_back(self, output: Tensor, call: dict[str, Any]) -> Any:
        x = call["x"]
        if isinstance(x, Tensor):
            return output.to(x.device)
        return [part.to(like.device) for part, like in zip(unpacked(output, shapes_of(x)), x, strict=True)]
