"""The rows of a call: its tensors have one entry for each row of the batch, or one for all."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.errors import InputError


def rows_of(value: Any, rows: range, *, batch: int | None = None) -> Any:
    """A call's rows: tensors with one entry for each row are cut, those with one for all are kept.

    batch: how many rows there are; by default as many as `value["x"]` has. Raises InputError for other tensors.
    """
    if batch is None:
        batch = value["x"].shape[0]
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] == 1 != batch:
            return value
        if value.shape[0] != batch:
            raise InputError(
                f"a tensor of {value.shape[0]} rows cannot go with a batch of {batch}; use 1 or {batch}"
            )
        return value[rows.start : rows.stop]
    if isinstance(value, dict):
        return {key: rows_of(item, rows, batch=batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rows_of(item, rows, batch=batch) for item in value]
    return value


def batched(calls: list[dict[str, Any]], constants: Container[str] = ()) -> dict[str, Any] | None:
    """The calls as one batch; None where they differ in more than the numbers in their tensors.

    constants: arguments that have no rows, so they must be the same.
    """
    first, *rest = calls
    if not rest:
        return None
    joined: dict[str, Any] = {}
    for key, value in first.items():
        others = [call.get(key) for call in rest]
        if isinstance(value, Tensor) and key not in constants:
            tensors = [value, *(other for other in others if isinstance(other, Tensor))]
            if value.dim() == 0 or [item.shape for item in tensors] != [value.shape] * len(calls):
                return None
            joined[key] = torch.cat([item.expand(first["x"].shape[0], *item.shape[1:]) for item in tensors])
        elif all(other is value or (not _has_tensors(value) and other == value) for other in others):
            joined[key] = value
        else:
            return None
    return joined if all(call.keys() == first.keys() for call in rest) else None


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)
