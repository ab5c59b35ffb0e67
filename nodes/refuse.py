"""What would run inside the transformer, and so can't run on the workers, is refused by name.

Dropping it silently would give an image that looks right and isn't.
"""

from __future__ import annotations

from typing import Any

import comfy.hooks

HARMLESS = frozenset(
    (
        # The loop's own notes to whoever wants them.
        *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "context_window", "prefetch_dynamic_vbars"),
        # Around the transformer, on the host.
        *("wrappers", "callbacks"),
    )
)
"""Entries of transformer_options that don't change what the transformer computes."""

INSTEAD = "; remove that node, or sample with the stock sampler and without Parallel Model (xDiT)"


Conds = dict[str, list[dict[str, Any]]]
"""Kind (positive, negative, ...) → its conditioning."""


def refuse_inside(patcher: Any, model_options: dict[str, Any], conds: Conds) -> None:
    """Raise ValueError, naming every change to the inside of the model, when there is one.

    model_options, conds: those of the run.
    """
    _refuse(
        *_in_options(model_options.get("transformer_options", {})),
        *_in_patcher(patcher),
        *_in_conds(conds),
    )


def refuse_options(options: dict[str, Any]) -> None:
    """As `refuse_inside`, for the transformer_options of one call: some nodes change them in mid-run."""
    _refuse(*_in_options(options))


def _refuse(*found: str) -> None:
    if found:
        raise ValueError(f"the pool can't run {'; nor '.join(dict.fromkeys(found))}{INSTEAD}")


def name_of(value: Any) -> str:
    """Where a callable comes from, for people: module and name."""
    function = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(function, '__module__', '?')}.{function.__qualname__}".replace(".<locals>", "")


def _in_options(options: dict[str, Any]) -> list[str]:
    found = [
        f"the block patch {kind!r} ({name_of(patch)})"
        for kind, patches in options.get("patches", {}).items()
        for patch in patches
    ]
    found += [
        f"the replaced {kind} of block {block} ({name_of(patch)})"
        for kind, blocks in options.get("patches_replace", {}).items()
        for block, patch in blocks.items()
    ]
    override = options.get("optimized_attention_override")
    if override is not None:
        found.append(f"the replaced attention ({name_of(override)})")
    known = HARMLESS | {"patches", "patches_replace", "optimized_attention_override"}
    for name, value in options.items():
        if name in known or value is None or _own_state(value):
            continue
        found.append(f"the transformer option {name!r}")
    return found


def _own_state(value: Any) -> bool:
    """Whether it is an object of a node that wraps the model (EasyCache): the transformer can't know it."""
    return callable(getattr(value, "clone", None)) and not isinstance(value, (dict, list, tuple))


def _in_patcher(patcher: Any) -> list[str]:
    inside = [name for name in patcher.object_patches if name.startswith("diffusion_model")]
    found = [f"the object patch {name!r}" for name in inside]
    found += [f"the weight wrapper on {name!r}" for name in patcher.weight_wrapper_patches]
    found += [f"the injection {name!r}" for name, made in patcher.injections.items() if made]
    found += [
        f"the load callback {name_of(callback)}" for callback in patcher.get_all_callbacks("on_load_after")
    ]
    if patcher.get_additional_models_with_key("multigpu"):
        found.append("ComfyUI's own multi-GPU mode")
    return found


def _in_conds(conds: Conds) -> list[str]:
    found = []
    for cond in (cond for group in conds.values() for cond in group or ()):
        if cond.get("control") is not None:
            found.append(f"a ControlNet ({name_of(cond['control'])})")
        if cond.get("gligen") is not None:
            found.append("GLIGEN")
        hooks = cond.get("hooks")
        for hook in hooks.get_type(comfy.hooks.EnumHookType.Weight) if hooks is not None else ():
            found.append(f"a weight hook ({name_of(hook)})")
    return found
