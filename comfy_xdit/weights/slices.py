"""Which rows of which checkpoint weight make which weight of the diffusers model.

ComfyUI keeps some weights fused (qkv) or in another order (shift before scale) than diffusers. A family
says so once, in a `Table`; here it becomes row numbers, which serve loading and patching alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from comfy_xdit.errors import InputError

Infos = Mapping[str, Any]
"""Key → anything that has a `shape`: a header entry or a tensor."""


class Slice(NamedTuple):
    """`rows` rows of `source`, from `source_row` on, are the target's rows from `target_row` on."""

    source: str
    source_row: int
    rows: int
    target_row: int


SliceMap = dict[str, list[Slice]]
"""Target key → its slices in the order of the target's rows, without gaps."""


class Share(NamedTuple):
    """A part of a weight: it is `rows` shares long and starts at share `target_row` of `target`."""

    target: str
    rows: int = 1
    target_row: int = 0


Table = Mapping[str, tuple[Share, ...]]
"""ComfyUI's weight → its parts, from the first row to the last.

Names come without ".weight" and ".bias"; a name that ends in neither is given whole, and so is its target.
"*" is the number of a block, the second part of a name; a name with that number wins over the one with "*".
A weight without parts, of either layout, is one that files have and no model uses.
"""


class Shape(NamedTuple):
    """A weight of ComfyUI's layout that the file keeps in parts."""

    shape: tuple[int, ...]


def whole(target: str) -> tuple[Share, ...]:
    """The weight is the target."""
    return (Share(target),)


def stacked(*targets: str) -> tuple[Share, ...]:
    """The targets, of equally many rows, lie one below the other."""
    return tuple(Share(target) for target in targets)


def swapped(target: str) -> tuple[Share, ...]:
    """The halves lie the other way round: shift and scale here, scale and shift in diffusers."""
    return (Share(target, 1, 1), Share(target, 1, 0))


def slice_map(table: Table, infos: Infos) -> SliceMap:
    """The slices of every target that ComfyUI's weights `infos` make.

    Raises InputError for weights that the table doesn't know, and for rows that can't be shared out.
    """
    targets: SliceMap = {}
    unknown = []
    for key, info in infos.items():
        found = _find(table, key)
        if found is None:
            unknown.append(key)
            continue
        shares, suffix, block = found
        if not shares:
            continue
        rows = info.shape[0] if len(info.shape) else 0
        unit, rest = divmod(rows, sum(share.rows for share in shares))
        if rest or not unit:
            raise InputError(f"the {rows} rows of {key} do not divide into its parts; the file is damaged")
        row = 0
        for share in shares:
            target = share.target.replace("*", block) + suffix
            piece = Slice(key, row, share.rows * unit, share.target_row * unit)
            targets.setdefault(target, []).append(piece)
            row += piece.rows
    if unknown:
        raise InputError(f"{len(unknown)} weights have no place in this model (first: {unknown[0]})")
    for pieces in targets.values():
        pieces.sort(key=lambda piece: piece.target_row)
    return targets


def is_unused(table: Table, key: str) -> bool:
    """Whether files have this weight, in either layout, and no model uses it."""
    found = _find(table, key)
    return found is not None and not found[0]


def narrowed(pieces: list[Slice], row: int, rows: int) -> list[Slice]:
    """The slices of `rows` rows of a target from `row` on, numbered from there."""
    found = []
    for piece in pieces:
        begin = max(row, piece.target_row)
        end = min(row + rows, piece.target_row + piece.rows)
        if begin < end:
            skipped = begin - piece.target_row
            found.append(Slice(piece.source, piece.source_row + skipped, end - begin, begin - row))
    return found


def by_source(targets: SliceMap) -> dict[str, list[tuple[str, Slice]]]:
    """The same slices by source: source key → (target key, slice), in the order of the source's rows."""
    sources: dict[str, list[tuple[str, Slice]]] = {}
    for target, pieces in targets.items():
        for piece in pieces:
            sources.setdefault(piece.source, []).append((target, piece))
    for parts in sources.values():
        parts.sort(key=lambda part: part[1].source_row)
    return sources


def fused(table: Table, infos: Infos) -> dict[str, Shape]:
    """ComfyUI's weights that diffusers' own weights `infos` make: what ComfyUI itself would see.

    Raises InputError when a weight is unknown, or a part of a fused one is missing.
    """
    names = {share.target: name for name, shares in table.items() for share in shares}
    result: dict[str, Shape] = {}
    unknown = []
    for key, info in infos.items():
        if is_unused(table, key):
            continue
        found = _match(names, key)
        if found is None:
            unknown.append(key)
            continue
        name, suffix, block = found
        source = name.replace("*", block) + suffix
        if source in result:
            continue
        rows = 0
        for target in dict.fromkeys(share.target.replace("*", block) + suffix for share in table[name]):
            if target not in infos:
                raise InputError(f"{target} is missing; the file is incomplete")
            rows += infos[target].shape[0]
        result[source] = Shape((rows, *info.shape[1:]))
    if unknown:
        raise InputError(f"{len(unknown)} weights have no place in this model (first: {unknown[0]})")
    return result


def respelled(key: str) -> str:
    """The other spelling of a norm's weight: some versions of ComfyUI say "scale", others "weight"."""
    if key.endswith("_norm.weight"):
        return key.removesuffix("weight") + "scale"
    return key.removesuffix("scale") + "weight" if key.endswith("_norm.scale") else key


def shape_of(infos: Infos, key: str, num_dims: int) -> tuple[int, ...]:
    """The shape of a weight that must be there with so many dims. Raises InputError when it isn't, or is empty."""
    if key not in infos:
        raise InputError(f"{key} is missing; the file is incomplete")
    shape = tuple(infos[key].shape)
    if len(shape) != num_dims or 0 in shape:
        raise InputError(f"{key} has the shape {shape}, which is not {num_dims} sizes; the file is damaged")
    return shape


def block_numbers(infos: Infos, stack: str) -> list[int]:
    """The numbers of the blocks under `stack`, in order. Raises InputError when one is left out."""
    found = {int(key.split(".", 2)[1]) for key in infos if key.startswith(stack + ".") and _block(key)}
    if found != set(range(len(found))):
        missing = min(set(range(max(found))) - found)
        raise InputError(f"{stack}.{missing} is missing; the file is incomplete")
    return sorted(found)


def _block(key: str) -> str:
    parts = key.split(".", 2)
    return parts[1] if len(parts) == 3 and parts[1].isdecimal() and len(parts[1]) <= 4 else ""


def _match(names: Mapping[str, Any], key: str) -> tuple[Any, str, str] | None:
    """What `names` has for `key`, with the suffix and the block number that the other side's name takes."""
    block = _block(key)
    for suffix in ("", ".weight", ".bias"):
        if key.endswith(suffix):
            stem = key.removesuffix(suffix)
            for name in (stem, stem.replace(f".{block}.", ".*.", 1) if block else stem):
                if name in names:
                    return names[name], suffix, block
    return None


def _find(table: Table, key: str) -> tuple[tuple[Share, ...], str, str] | None:
    return _match(table, key) or _match(table, respelled(key))
