"""A model of ComfyUI's own class, its weights views of the mapped file.

Nothing is chosen here: class, dtypes and configuration are the host's, and what ComfyUI finds in the file is compared
with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.messages import ComfySource

from .gguf import GGUF, shapes_of

log = logging.getLogger("comfy_xdit")

Mine = Callable[[str, Tensor], Tensor | None]
"""Name and whole weight → what this rank holds of it, a view where it can be, and None for nothing."""

Part = Callable[[nn.Module], Mine]
"""The transformer, whose weights are not read yet → what this rank holds; blocks of other stages are left out of it."""


def whole(net: nn.Module) -> Mine:
    return lambda key, weight: weight


def config_hash(config: Any) -> str:
    """Of everything that the class of a model is made with, dtype included."""
    text = json.dumps(config.unet_config, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


SMALL_BYTES = 4096
"""What is no longer than a page is kept beside the model, wherever it came from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, and what its file has for it. Weights are named as the transformer names them.

    model: ComfyUI's BaseModel, ready to run. addresses: those at which the file is mapped.
    shapes: of the weights that ComfyUI patches, whole, whatever part of them is here; None for those that it never
    patches: buffers, and parameters of modules that have modules with parameters.
    elsewhere: names of what other ranks hold; cut: names of what they hold a part of.
    """

    model: Any
    addresses: range
    shapes: dict[str, tuple[int, ...] | None]
    elsewhere: frozenset[str]
    cut: frozenset[str]
    _base: dict[str, Tensor]
    _mine: Mine
    _lost: frozenset[str]
    _device: torch.device
    _pack: GGUF | None

    def is_packed(self, weight: Any) -> bool:
        """Whether a weight is in blocks of a GGUF file: layers unpack and patch it at each use."""
        return self._pack is not None and self._pack.is_quantised(weight)

    def can_restore(self, layer: str) -> bool:
        """Whether all weights of the module `layer` can be had from the file again."""
        return layer not in self._lost

    def restore(self, layers: set[str]) -> None:
        """Give these modules, which `can_restore`, their weights again, as they were after the load."""
        net = self.model.diffusion_model
        weights = {key: weight for key, weight in self._base.items() if layer_of(key) in layers}
        own: dict[str, dict[str, Tensor]] = {layer: {} for layer in layers}
        for key, value in _own(net, weights, self._device, self._mine, self._pack)[0].items():
            own[layer_of(key)][key.rpartition(".")[2]] = value
        for layer, values in own.items():
            _assign(net.get_submodule(layer), values, self._device)

    def whole(self, key: str) -> Tensor:
        """All of a weight that is cut, from the file, in its dtype here.

        Raises InputError where the file hasn't got it.
        """
        weight = self._base.get(key)
        if weight is None:
            raise InputError(
                f"{key} is in the file in another layout, and a part of it can't be patched (LoRA); use tensor=1"
            )
        held = self.model.diffusion_model.get_parameter(key)
        return weight.to(device=self._device, dtype=held.dtype)

    def own_part(self, key: str, weight: Tensor) -> Tensor:
        """A copy of this rank's part of a weight that is cut."""
        part = self._mine(key, weight)
        assert part is not None, f"{key} is on another rank"
        return part.clone()


def layer_of(key: str) -> str:
    """The path of the module that holds the weight `key`."""
    return key.rpartition(".")[0]


def load(path: str, told: ComfySource, device: torch.device, part: Part = whole) -> Loaded:
    """ComfyUI's model of the file, with the host's choices, and how its weights are had again.

    part: which of its weights are for this rank; no others are read.

    To be called, and the model to be run, under `torch.inference_mode`. Keys that the file lacks or has beside are
    logged, as ComfyUI does. Raises InputError when ComfyUI finds another model in the file than the host did.
    """
    pack = GGUF(told.gguf) if told.gguf is not None else None
    weights, metadata = (pack.read(path), None) if pack is not None else read(path)
    addresses = _span(list(weights.values()))
    config, weights = configured(weights, metadata, told)
    if pack is not None:
        config.custom_operations = pack.operations
    # On the CPU, whatever the device: there memory that is never touched is never taken.
    model = config.get_model(weights, "", device=None)
    model.device = device
    net = model.diffusion_model
    weights = config.process_unet_state_dict(dict(weights))
    shapes = {**_shapes(net), **(shapes_of(net, weights) if pack is not None else {})}
    mine = part(net)
    own, elsewhere = _own(net, weights, device, mine, pack)
    cut = {key for key, value in own.items() if value.shape != weights[key].shape}
    missing, unexpected = _assign(net, own, device)
    for what, keys in (("missing", set(missing) - elsewhere), ("unexpected", set(unexpected))):
        if keys:
            log.warning("unet %s: %s", what, sorted(keys))
    if pack is not None:
        pack.tell_layers(net)
    # What was computed from the file is not kept: it would be in memory twice.
    base = {key: one for key, one in weights.items() if one.nbytes <= SMALL_BYTES or one.data_ptr() in addresses}
    return Loaded(
        model=model,
        addresses=addresses,
        shapes=shapes,
        elsewhere=frozenset(elsewhere),
        cut=frozenset(cut),
        _base=base,
        _mine=mine,
        _lost=frozenset(layer_of(key) for key in (shapes.keys() | weights.keys()) - base.keys()),
        _device=device,
        _pack=pack,
    )


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Key → view of the mapped file, in any dtype, and the notes in its header; no weight is read."""
    import safetensors

    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _span(views: list[Tensor]) -> range:
    """The addresses from the first view to the end of the last."""
    begins = [view.data_ptr() for view in views if view.nbytes]
    ends = [view.data_ptr() + view.nbytes for view in views if view.nbytes]
    return range(min(begins, default=0), max(ends, default=0))


def configured(weights: dict[str, Tensor], metadata: Any, told: ComfySource) -> tuple[Any, dict[str, Tensor]]:
    """ComfyUI's configuration of the file with the host's choices, and the weights as it names them."""
    config, weights = detected(weights, metadata, is_gguf=told.gguf is not None)
    found = type(config).__name__ if config is not None else "no model"
    if found != told.kind:
        raise InputError(f"the workers' ComfyUI takes the file for {found}, this one for {told.kind}; restart the pool")
    config.set_inference_dtype(_dtype(told.dtype), _dtype(told.cast) if told.cast else None)
    config.optimizations["fp8"] = told.fp8
    if config_hash(config) != told.config:
        raise InputError(
            f"the workers' ComfyUI reads other sizes of {told.kind} from the file than this one; restart the pool"
        )
    return config, weights


def detected(weights: dict[str, Tensor], metadata: Any, *, is_gguf: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """ComfyUI's configuration of a file, None where it knows no such model, and the weights as it names them.

    Dtypes and operations are not chosen yet. Takes entries out of `weights`.
    """
    import comfy.model_detection as detection
    import comfy.utils

    def converted(weights: dict[str, Tensor], metadata: Any) -> tuple[dict[str, Tensor], Any]:
        if is_gguf:
            return weights, metadata  # another pack's layers don't know ComfyUI's formats
        return comfy.utils.convert_old_quants(weights, "", metadata=metadata)  # type: ignore[no-any-return]

    weights, metadata = converted(weights, metadata)
    prefix = detection.unet_prefix_from_state_dict(weights)
    if of_model := comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True):
        weights, metadata = converted(of_model, metadata)
    config = detection.model_config_from_unet(weights, "", metadata=metadata)
    if config is None:
        weights = detection.convert_diffusers_mmdit(weights, "") or {}
        config = detection.model_config_from_unet(weights, "") if weights else None
    return config, weights


def _assign(layer: Any, own: dict[str, Tensor], device: torch.device) -> tuple[list[str], list[str]]:
    """Make `own` its weights, ready to run; returns the names that are missing and those that are too many."""
    missing, unexpected = layer.load_state_dict(own, strict=False, assign=True)
    layer.requires_grad_(False)
    layer.to(device)
    if _channels_last():
        layer.to(memory_format=torch.channels_last)
    return missing, unexpected


def _own(
    net: nn.Module, weights: dict[str, Tensor], device: torch.device, mine: Mine, pack: GGUF | None
) -> tuple[dict[str, Tensor], set[str]]:
    """What to load here, in the module's dtypes, and the names of what other ranks hold.

    On a CPU a weight that has its dtype in the file stays a view of it.
    """
    held = (*net.named_parameters(), *net.named_buffers())
    # A quantised weight calls itself what it is computed in, and is loaded as it lies in the file.
    dtypes = {key: value.dtype for key, value in held if not hasattr(value, "__tensor_flatten__")}
    for layer in net.modules():
        # Layers that may be quantised put their weights where they were made.
        if made_with := cast("dict[str, Any]", getattr(layer, "factory_kwargs", None)):
            made_with["device"] = device
    own: dict[str, Tensor] = {}
    elsewhere: set[str] = set()
    for key, weight in weights.items():
        part = mine(key, weight)
        if part is None:
            elsewhere.add(key)
            continue
        if key.endswith(".comfy_quant"):
            own[key] = weight  # JSON in bytes, which ComfyUI reads on the CPU
            continue
        if pack is not None:
            own[key] = pack.as_parameter(part, device, dtypes.get(key))
            continue
        if part.shape != weight.shape and key in dtypes:
            _resize(net, key, part)
        own[key] = part.to(device=device, dtype=dtypes.get(key, part.dtype))
    return own, elsewhere


def _resize(net: nn.Module, key: str, part: Tensor) -> None:
    """Make room for a part: torch compares shapes also where it then assigns."""
    path, _, name = key.rpartition(".")
    empty = torch.empty(part.shape, dtype=part.dtype, device="meta")
    net.get_submodule(path)._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """As `Loaded.shapes`; of the model before its weights are loaded."""
    shapes: dict[str, tuple[int, ...] | None] = {name: None for name, _ in net.named_buffers()}
    for path, layer in net.named_modules():
        is_whole = not any(_own_shapes(child) for child in layer.modules() if child is not layer)
        for name, shape in _own_shapes(layer).items():
            shapes[f"{path}.{name}".lstrip(".")] = shape if is_whole else None
    return shapes


def _own_shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters(recurse=False)}
    # Layers that may be quantised have no weight before they are loaded.
    late = getattr(layer, "_orig_shape", None)
    return shapes if late is None else {"weight": tuple(late), **shapes}


def _channels_last() -> bool:
    import comfy.model_management

    return bool(comfy.model_management.force_channels_last())


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{name!r} is no dtype of torch {torch.__version__}; start the pool with ComfyUI's torch")
    return dtype
