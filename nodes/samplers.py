"""Stand-ins for the stock sampler nodes: the same widgets, the work on the pool.

Each calls the stock node's own code on the converted MODEL, so that seeds, previews, masks and what
later versions of ComfyUI add are the host's.
"""

from __future__ import annotations

import copy
from typing import Any

from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.pool import CATEGORY, POOL_INPUT, PoolSetting

import nodes as host_nodes

TOOLTIPS = {
    "model": "The model used for denoising the input latent; it runs on the pool.",
    "add_noise": "Whether noise is added to the latent before sampling.",
    "noise_seed": "The random seed of the noise.",
    "steps": "The number of denoising steps.",
    "cfg": "The classifier-free guidance scale. Above 1 the negative prompt is evaluated too.",
    "sampler_name": "The sampling algorithm.",
    "scheduler": "How the noise is removed over the steps.",
    "positive": "What the image should show.",
    "negative": "What the image should not show.",
    "latent_image": "The latent to denoise.",
    "start_at_step": "The first step to run.",
    "end_at_step": "The step to stop before.",
    "return_with_leftover_noise": "Whether the noise that is left at end_at_step stays in the latent.",
    "noise": "The noise to start from.",
    "guider": "The guider with the model and its conditioning; the model runs on the pool.",
    "sampler": "The sampling algorithm.",
    "sigmas": "The noise levels to step through.",
}
"""For the inputs that the stock nodes leave without one."""


def with_pool(stock: dict[str, Any]) -> dict[str, Any]:
    """The stock node's inputs, a tooltip on each, and the optional pool."""

    def explained(name: str, definition: tuple) -> tuple:
        options = dict(definition[1]) if len(definition) > 1 else {}
        options.setdefault("tooltip", TOOLTIPS.get(name, "As in the stock node."))
        return (definition[0], options)

    inputs = {
        group: {name: explained(name, definition) for name, definition in members.items()}
        for group, members in stock.items()
        if group != "hidden"
    }
    inputs.setdefault("optional", {})["pool"] = POOL_INPUT
    return inputs


class XDiTKSampler:
    """The stock KSampler on the pool."""

    DESCRIPTION = "KSampler, with the diffusion transformer on a pool of workers."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    FUNCTION = "sample"
    SEARCH_ALIASES = ("xdit", "multi gpu", "parallel")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return with_pool(host_nodes.KSampler.INPUT_TYPES())

    def sample(self, model: Any, pool: PoolSetting | None = None, **inputs: Any) -> tuple[Any, ...]:
        return host_nodes.KSampler().sample(model=parallelize(model, pool), **inputs)


class XDiTKSamplerAdvanced:
    """The stock KSampler (Advanced) on the pool."""

    DESCRIPTION = "KSampler (Advanced), with the diffusion transformer on a pool of workers."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    FUNCTION = "sample"
    SEARCH_ALIASES = ("xdit", "multi gpu", "parallel")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return with_pool(host_nodes.KSamplerAdvanced.INPUT_TYPES())

    def sample(self, model: Any, pool: PoolSetting | None = None, **inputs: Any) -> tuple[Any, ...]:
        return host_nodes.KSamplerAdvanced().sample(model=parallelize(model, pool), **inputs)


class XDiTSamplerCustomAdvanced:
    """The stock SamplerCustomAdvanced on the pool."""

    DESCRIPTION = "SamplerCustomAdvanced, with the diffusion transformer on a pool of workers."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")
    OUTPUT_TOOLTIPS = ("The latent at the last sigma.", "The model's last estimate of the clean latent.")
    FUNCTION = "sample"
    SEARCH_ALIASES = ("xdit", "multi gpu", "parallel")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        stock = SamplerCustomAdvanced.INPUT_TYPES()
        return with_pool({"required": {name: tuple(stock["required"][name]) for name in stock["required"]}})

    def sample(self, guider: Any, pool: PoolSetting | None = None, **inputs: Any) -> tuple[Any, ...]:
        guider = on_pool(guider, pool)
        if hasattr(SamplerCustomAdvanced, "define_schema"):
            return SamplerCustomAdvanced.execute(guider=guider, **inputs).result
        return SamplerCustomAdvanced().sample(guider=guider, **inputs)


def on_pool(guider: Any, pool: PoolSetting | None) -> Any:
    """A shallow copy of `guider` whose MODEL runs on the pool; the caller's guider stays as it is."""
    ours = copy.copy(guider)
    ours.model_patcher = parallelize(guider.model_patcher, pool)
    if guider.model_options is guider.model_patcher.model_options:
        ours.model_options = ours.model_patcher.model_options
    return ours
