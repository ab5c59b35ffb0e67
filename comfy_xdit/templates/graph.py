"""ComfyUI's template package, read: what each workflow samples with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.errors import InputError

OFF = (2, 4)
"""Modes of a node that is muted or bypassed."""

MODEL_FILES = ("diffusion_models", "checkpoints", "unet")
"""Folders of files with a diffusion model in them."""

LOADERS = ("UNETLoader", "CheckpointLoaderSimple", "ImageOnlyCheckpointLoader", "UnetLoaderGGUF")
NO_SAMPLERS = ("KSamplerSelect", "ModelSampling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A workflow. usage: how often it was started, as the package's index says.

    files: of the diffusion models that its loaders name; samplers: its nodes that sample; patches: its nodes that
    change a MODEL; conditioning: those that change conditioning.
    """

    name: str
    title: str
    usage: int
    files: tuple[str, ...]
    samplers: tuple[str, ...]
    patches: tuple[str, ...]
    conditioning: tuple[str, ...]


def templates(folder: Path) -> list[Template]:
    """All workflows of the package whose templates lie in `folder`, the most used first.

    Raises InputError where there is no index, or one that can't be read.
    """
    try:
        groups = json.loads((folder / "index.json").read_text("utf-8"))
        entries = {entry["name"]: entry for group in groups for entry in group["templates"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no templates there ({type(error).__name__}); name the folder with index.json") from None
    found = [
        _read(folder / f"{name}.json", entry)
        for name, entry in entries.items()
        if (folder / f"{name}.json").is_file()
    ]
    return sorted(found, key=lambda template: (-template.usage, template.name))


def _read(path: Path, entry: dict[str, Any]) -> Template:
    nodes = [node for node in _nodes(json.loads(path.read_text("utf-8"))) if node.get("mode", 0) not in OFF]
    return Template(
        name=entry["name"],
        title=entry.get("title", entry["name"]),
        usage=entry.get("usage", 0),
        files=_sorted(file for node in nodes for file in _files(node)),
        samplers=_sorted(
            node["type"] for node in nodes if "Sampler" in node["type"] and not node["type"].startswith(NO_SAMPLERS)
        ),
        patches=_sorted(node["type"] for node in nodes if _changes(node, "MODEL")),
        conditioning=_sorted(node["type"] for node in nodes if _changes(node, "CONDITIONING")),
    )


def _nodes(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the workflow and of its subgraphs."""
    inner = graph.get("definitions", {}).get("subgraphs", [])
    names = {subgraph.get("id") for subgraph in inner}
    for part in (graph, *inner):
        yield from (node for node in part.get("nodes", []) if node["type"] not in names)


def _changes(node: dict[str, Any], kind: str) -> bool:
    """Whether it takes something of `kind` and gives it."""
    return all(kind in {slot.get("type") for slot in node.get(side) or ()} for side in ("inputs", "outputs"))


def _files(node: dict[str, Any]) -> Iterator[str]:
    """Names of the diffusion models that a loader has chosen, or brings."""
    notes = node.get("properties", {}).get("models") or ()
    yield from (note["name"] for note in notes if note.get("directory") in MODEL_FILES)
    if node["type"] in LOADERS:
        values = node.get("widgets_values") or ()
        chosen = values.values() if isinstance(values, dict) else values
        yield from (value for value in chosen if isinstance(value, str) and value.endswith((".safetensors", ".gguf")))


def _sorted(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(sorted({name.replace("\\", "/").rpartition("/")[2] for name in names}))
