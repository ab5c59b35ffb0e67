"""What would run inside the transformer, and so can't run on the workers, is refused by name.

Dropping it silently would give an image that looks right and isn't.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from comfy.hooks import EnumHookType
from comfy_xdit_nodes.named import name_of, name_of_option, words

HARMLESS = frozenset(
    (
        # The loop's own notes to whoever wants them.
        *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "context_window", "prefetch_dynamic_vbars"),
        # Around the transformer, on the host.
        *("wrappers", "callbacks"),
    )
)
"""Entries of transformer_options that ComfyUI's own loop puts there, and that change nothing in the transformer."""

STATE = {"easycache": "comfy_extras.nodes_easycache"}
"""Entries that only the wrappers of their own node read → the module of the objects that they then are."""

INSTEAD = "; remove that node, or sample with the stock sampler and without Parallel Model (xDiT)"

LOOP_FUNCTIONS = (
    *("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"),
    *("sampler_calc_cond_batch_function", "model_function_wrapper"),
)
"""Entries of model_options with functions that evaluate the model, and may change it for one evaluation."""

REACHES_INSIDE = frozenset(
    ("set_model_options_patch_replace", "patches_replace", "optimized_attention_override")
)
"""Names in the code of a function that puts something into the transformer in mid-run."""

Conds = dict[str, list[dict[str, Any]]]
"""Kind (positive, negative, ...) → its conditioning."""


def refuse_inside(patcher: Any, model_options: dict[str, Any], conds: Conds) -> None:
    """Raise ValueError, naming every change to the inside of the model, when there is one.

    model_options, conds: those of the run. What the model itself reads of transformer_options may be there.
    """
    own = getattr(patcher.model.checkpoint.family, "options", ())
    _refuse(
        *_in_options(model_options.get("transformer_options", {}), own),
        *_in_loop(model_options),
        *_in_patcher(patcher),
        *_in_conds(conds),
    )


def refuse_options(options: dict[str, Any], own: Collection[str] = ()) -> None:
    """As `refuse_inside`, for the transformer_options of one call: some nodes change them in mid-run.

    own: those that the model itself reads, and that go to the workers.
    """
    _refuse(*_in_options(options, own))


def _refuse(*found: str) -> None:
    if found:
        raise ValueError(f"the pool can't run {'; nor '.join(dict.fromkeys(found))}{INSTEAD}")


def _in_options(options: dict[str, Any], own: Collection[str] = ()) -> list[str]:
    found = [
        f"the block patch {kind!r} ({name_of(patch)})"
        for kind, patches in options.get("patches", {}).items()
        for patch in patches
    ]
    found += [
        f"the replaced {kind} of block {_block(block)} ({name_of(patch)})"
        for kind, blocks in options.get("patches_replace", {}).items()
        for block, patch in blocks.items()
    ]
    override = options.get("optimized_attention_override")
    if override is not None:
        found.append(f"the replaced attention ({name_of(override)})")
    known = HARMLESS | {"patches", "patches_replace", "optimized_attention_override"}
    for name, value in options.items():
        if name in known or name in own or value is None or _is_state(name, value):
            continue
        found.append(f"the transformer option {name!r}{name_of_option(name, value)}")
    return found


def _is_state(name: str, value: Any) -> bool:
    """Whether only wrappers read it. ComfyUI imports its own nodes by their path, and calls the module so."""
    module = type(value).__module__.replace("/", ".")
    return name in STATE and f".{module}".endswith(f".{STATE[name]}")


def _block(block: Any) -> str:
    """ComfyUI's ("double_block", 0), for people."""
    return " ".join(map(str, block)) if isinstance(block, tuple) else str(block)


def _in_loop(model_options: dict[str, Any]) -> list[str]:
    """Functions between the steps that will change the inside of the model in one of them."""
    found = []
    for option in LOOP_FUNCTIONS:
        functions = model_options.get(option) or ()
        for function in functions if isinstance(functions, (list, tuple)) else (functions,):
            if REACHES_INSIDE & set(words(getattr(function, "__code__", None))):
                found.append(f"the blocks that are replaced in some steps ({name_of(function)})")
    return found


def _in_patcher(patcher: Any) -> list[str]:
    found = [
        f"the object patch {name!r}{_of(value)}"
        for name, value in patcher.object_patches.items()
        if name.startswith("diffusion_model")
    ]
    found += [
        f"the weight wrapper on {name!r}{_of(*wrappers)}" for name, wrappers in patcher.weight_wrapper_patches.items()
    ]
    found += [
        f"the injection {name!r}{_of(*(one.inject for one in made if hasattr(one, 'inject')))}"
        for name, made in patcher.injections.items()
        if made
    ]
    found += [f"the load callback ({name_of(callback)})" for callback in patcher.get_all_callbacks("on_load_after")]
    if patcher.get_additional_models_with_key("multigpu"):
        found.append("ComfyUI's own multi-GPU mode")
    return found


def _of(*values: Any) -> str:
    """Who made them, in brackets; nothing for plain values, which don't tell."""
    told = [value for value in values if type(value).__module__ not in ("builtins", "torch") or callable(value)]
    return f" ({name_of(told[0])})" if told else ""


def _in_conds(conds: Conds) -> list[str]:
    found = []
    for cond in (cond for group in conds.values() for cond in group or ()):
        if cond.get("control") is not None:
            found.append(f"a ControlNet ({name_of(cond['control'])})")
        if cond.get("gligen") is not None:
            found.append("GLIGEN")
        if cond.get("hooks") is not None:
            found += _in_hooks(cond["hooks"])
    return found


def _in_hooks(hooks: Any) -> Iterable[str]:
    for hook in hooks.get_type(EnumHookType.Weight):
        yield f"a weight hook ({name_of(hook)})"
    for hook in hooks.get_type(EnumHookType.TransformerOptions):
        yield from _in_options(hook.transformers_dict)
