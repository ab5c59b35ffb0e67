"""A file of conditioning tensors: for each prompt "<prompt>|context" and "<prompt>|pooled"."""

from __future__ import annotations

from safetensors import safe_open
from torch import Tensor

CONTEXT, POOLED = "|context", "|pooled"


def prompts(path: str) -> list[str]:
    """The prompts in the file, in alphabetical order; the empty one, if there, comes first.

    Raises ValueError for a file without any.
    """
    with safe_open(path, "pt") as file:
        keys = file.keys()
    found = sorted(key.removesuffix(CONTEXT) for key in keys if key.endswith(CONTEXT))
    if not found:
        raise ValueError(f'{path} holds no conditioning: no tensor in it is named "<prompt>{CONTEXT}"')
    return found


def load(path: str, prompt: str) -> tuple[Tensor, Tensor | None]:
    """context [1, tokens, dim] and, where the file has it, pooled [1, dim].

    Raises ValueError when the prompt is not in the file.
    """
    known = prompts(path)
    if prompt not in known:
        quoted = ", ".join(repr(name) for name in known)
        raise ValueError(f"{prompt!r} is not in {path}; it has {quoted}")
    with safe_open(path, "pt") as file:
        pooled = file.get_tensor(prompt + POOLED) if prompt + POOLED in file.keys() else None  # noqa: SIM118
        return file.get_tensor(prompt + CONTEXT), pooled
