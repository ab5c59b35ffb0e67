"""A drafted family, and its file in the language of `native/families/`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.native.selftest import run
from comfy_xdit.native.subject import Call, Subject, build
from comfy_xdit.parallel.tokens import TokenPlan

from .derive import derive
from .watch import watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A family, and the text of its file."""

    family: ComfyFamily
    text: str


def draft(name: str, subjects: list[Subject]) -> Draft:
    """Of what this ComfyUI's classes do with the subjects' calls. Raises InputError where no draft can be made."""
    models = [(build(subject.kind, config := subject.configured()), subject.calls(config)) for subject in subjects]
    plan = derive(models)
    rows, constants, options = dict[str, None](), dict[str, None](), dict[str, None]()
    for model, calls in models:
        for call in calls.values():
            options |= dict.fromkeys(call.get("transformer_options", {}))
            for argument, value in arguments_reached(model, call).items():
                (rows if _has_rows(value) else constants)[argument] = None
    model, calls = models[0]
    heads = _heads(model, next(iter(calls.values())), plan)
    family = ComfyFamily(
        name=name,
        title=name,
        kinds=tuple(dict.fromkeys(subject.kind for subject in subjects)),
        plan=plan,
        num_heads=eval(f"lambda transformer: {heads}"),
        rows=tuple(rows),
        constants=tuple(argument for argument in constants if argument not in rows),
        options=tuple(options),
    )
    return Draft(family=family, text=_text(family, heads))


def arguments_reached(model: nn.Module, call: Call) -> dict[str, Any]:
    """What reaches the transformer's innermost forward, beside x, the timestep and the options."""
    name = "_forward" if hasattr(model, "_forward") else "forward"
    inner, found = getattr(model, name), {}

    def noted(*args: Any, **kwargs: Any) -> Any:
        given = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        for argument in list(given)[2:]:
            if given[argument] is not None and argument != "transformer_options":
                found[argument] = given[argument]
        return inner(*args, **kwargs)

    setattr(model, name, noted)
    try:
        with torch.inference_mode():
            run(model, call)
    finally:
        delattr(model, name)
    return found


def _has_rows(value: Any) -> bool:
    """Whether an argument has entries for the rows of a batch."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return bool(items) and all(isinstance(item, Tensor) and item.ndim > 0 for item in items)


def _heads(model: nn.Module, call: Call, plan: TokenPlan) -> str:
    """Where the model says how many heads its attention has, as Python; of several kinds of attention the fewest."""
    seen = watch(model, call)
    lists = [blocks.path for blocks in plan.blocks]
    num = min(attended.heads for owner in lists for attended in seen.attended[owner])
    for path, module in model.named_modules():
        if path and not path.startswith(tuple(f"{owner}.0" for owner in lists)):
            continue
        for name, value in vars(module).items():
            if "head" in name and "dim" not in name and type(value) is int and value == num:
                places = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part)
                return f"transformer{places}.{name}"
    raise InputError(f"no attribute of the model says that it has {num} heads; its family must be written")


def _text(family: ComfyFamily, heads: str) -> str:
    rules = {type(rule).__name__ for blocks in family.plan.blocks for rule in blocks.takes.values()}
    words = ", ".join(sorted({"Attention", "Blocks", "TokenPlan", *rules}))
    lines = [
        f'"""{family.title}: (what its tokens are)."""',
        "",
        "from __future__ import annotations",
        "",
        "from comfy_xdit.native.family import ComfyFamily",
        f"from comfy_xdit.parallel.tokens import {words}",
        "",
        f"{family.name.upper().replace('-', '_').replace('.', '')} = ComfyFamily(",
        f'    name="{family.name}",',
        f'    title="{family.title}",',
        f"    kinds={_tuple(family.kinds)},",
        "    plan=TokenPlan(",
        *_plan(family.plan),
        "    ),",
        f"    num_heads=lambda transformer: {heads},",
        f"    rows={_tuple(family.rows)},",
    ]
    if family.constants:
        lines.append(f"    constants={_tuple(family.constants)},")
    if family.options:
        lines.append(f"    options={_tuple(family.options)},")
    return "\n".join([*lines, ")", ""])


def _plan(plan: TokenPlan) -> list[str]:
    lines = ["        blocks=("]
    for blocks in plan.blocks:
        lines += ["            Blocks(", f'                path="{blocks.path}",', "                takes={"]
        lines += [f'                    "{name}": {_rule(rule)},' for name, rule in blocks.takes.items()]
        lines += ["                },", f"                gives={_tuple(blocks.gives)},", "            ),"]
    lines += ["        ),", "        attention={"]
    lines += [f'            "{path}": {_rule(rule)},' for path, rule in plan.attention.items()]
    return [*lines, "        },"]


def _rule(rule: Any) -> str:
    """As it would be written: without what is the default."""
    streams, *more = dataclasses.fields(rule)
    words = [_literal(getattr(rule, streams.name))]
    for field in more:
        value = getattr(rule, field.name)
        if value != field.default:
            words.append(f"{field.name}={_literal(value)}")
    return f"{type(rule).__name__}({', '.join(words)})"


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return _tuple(value)
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _tuple(values: tuple[Any, ...]) -> str:
    inner = ", ".join(_literal(value) for value in values)
    return f"({inner},)" if len(values) == 1 else f"({inner})"
