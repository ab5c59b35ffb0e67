"""A MODEL in, a MODEL out that runs on the pool."""

from __future__ import annotations

from typing import Any

from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.pool import CATEGORY, POOL_INPUT, PoolSetting


class XDiTParallelModel:
    """Moves a MODEL's diffusion transformer to the pool."""

    DESCRIPTION = (
        "Moves a model's diffusion transformer to a pool of workers. The result is a MODEL as any other: "
        "every sampler, scheduler, guider and LoRA node takes it."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The same model, its diffusion transformer on the pool.",)
    FUNCTION = "parallelize"
    SEARCH_ALIASES = ("xdit", "multi gpu", "parallel", "taco")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "A MODEL from any loader, with or without LoRA. Flux.1, SD3 / SD3.5 and PixArt run under every method; of "
            "ComfyUI's other models those listed in docs/models.md, under cfg, dp, ulysses, ring and distri."
        )
        return {"required": {"model": ("MODEL", {"tooltip": tooltip})}, "optional": {"pool": POOL_INPUT}}

    def parallelize(self, model: Any, pool: PoolSetting | None = None) -> tuple[Any]:
        return (parallelize(model, pool or PoolSetting()),)
