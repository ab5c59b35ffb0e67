"""What people call the code that changes a run: the node that it came from, else its pack, else its own name."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths

import nodes as host_nodes

HOST_NODES = {
    "comfy.model_patcher.ModelPatcher.set_model_optimized_attention": "ModelAttentionBackend",
    "comfy.controlnet": "Apply ControlNet",
    "comfy.hooks": "Create Hook LoRA",
    "comfy.context_windows": "Context Windows (Manual)",
    "comfy_api.torch_helpers": "TorchCompileModel",
}
"""ComfyUI's own code that its nodes put on a MODEL, or on conditioning, from elsewhere → what the node is called."""

OPTIONS = {"rope_options": "ScaleROPE"}
"""Entries of transformer_options that a node of ComfyUI's sets, for image models → the node."""

MANY = 3
"""More nodes of one module say less than the name of their pack."""


def name_of(value: Any) -> str:
    """Where a callable or an object comes from, as an addition in brackets: `node "EasyCache"`.

    A node's class is found by the name under which a function was made in it; other code by its module's nodes.
    """
    code = _code(value)
    module, path = getattr(code, "__module__", None) or "", getattr(code, "__qualname__", type(code).__qualname__)
    outermost = getattr(sys.modules.get(module), path.split(".")[0], None)
    if _is_node(outermost):
        return f'node "{_title(outermost)}"'
    for host, title in HOST_NODES.items():
        if f"{module}.{path}".startswith(f"{host}."):
            return f'node "{title}"'
    there = [cls for cls in vars(sys.modules.get(module, object)).values() if _is_node(cls, module)]
    using = [cls for cls in there if path.split(".")[0] in _words_of_class(cls)]
    titles = [_title(cls) for cls in using or there]
    if 0 < len(titles) <= MANY:
        return "node " + " or ".join(f'"{title}"' for title in titles)
    pack = _pack(module)
    if pack is not None:
        return f'a node of "{pack}"'
    return f"{module.rsplit('/', 1)[-1]}.{path}".replace(".<locals>", "")


def words(code: types.CodeType | None) -> Iterator[str]:
    """The names and texts in a function's code, and in that of the functions that it makes."""
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from words(constant)


def name_of_option(name: str, value: Any) -> str:
    """As `name_of`, for an entry of transformer_options; "" when nothing is known of who set it."""
    if name in OPTIONS:
        return f' (node "{OPTIONS[name]}")'
    plain = type(value).__module__ in ("builtins", "torch")
    return "" if plain else f" ({name_of(value)})"


def _code(value: Any) -> Any:
    """The function or class that says most of a value."""
    while isinstance(value, functools.partial):
        value = value.func
    if inspect.ismethod(value) and not inspect.isclass(value.__self__):
        value = value.__self__
    return value if hasattr(value, "__qualname__") else type(value)


def _is_node(cls: Any, module: str | None = None) -> bool:
    """Whether it is the class of a node, old style or new; of `module`, where that is given."""
    if not inspect.isclass(cls) or (module is not None and cls.__module__ != module):
        return False
    new = hasattr(cls, "define_schema") and hasattr(cls, "execute")
    return new or (hasattr(cls, "INPUT_TYPES") and hasattr(cls, "FUNCTION"))


def _words_of_class(cls: Any) -> set[str]:
    """What the methods of a node's class name."""
    functions = [getattr(value, "__func__", value) for value in vars(cls).values()]
    return {word for function in functions for word in words(getattr(function, "__code__", None))}


def _title(cls: Any) -> str:
    """What ComfyUI's menu calls it."""
    for name, known in host_nodes.NODE_CLASS_MAPPINGS.items():
        if known is cls:
            return str(host_nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name, name))
    if hasattr(cls, "define_schema"):
        schema = cls.define_schema()
        return str(schema.display_name or schema.node_id)
    return str(cls.__name__)


def _pack(module: str) -> str | None:
    """The folder among the custom nodes that a module is in."""
    file = getattr(sys.modules.get(module), "__file__", None)
    for root in folder_paths.get_folder_paths("custom_nodes") if file else ():
        path = Path(file).resolve()
        if path.is_relative_to(Path(root).resolve()):
            return path.relative_to(Path(root).resolve()).parts[0].removesuffix(".py")
    return None
