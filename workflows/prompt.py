"""A saved ComfyUI workflow as the prompt that ComfyUI's HTTP API runs.

The graph format (what the browser saves) has widget values as a bare list; the API format names every
input. The names come from the nodes' schemas, `object_info`, as ComfyUI serves them under `/object_info`.
"""

from __future__ import annotations

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DRAWN_BY_THE_BROWSER = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
BYPASSED = (2, 4)
"""A node's `mode` when it is muted or bypassed."""


def inputs(definition: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Input name → (type, options), required ones first, in the order of the node's widgets and sockets.

    A choice has the type "COMBO" and its values under "options", whichever way the node declares it.
    """
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in definition["input"].get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if not isinstance(kind, str):
                kind, options = "COMBO", options | {"options": list(kind)}
            found[name] = (kind, options)
    return found


def widgets(definition: dict[str, Any]) -> list[str]:
    """The names of a node's widgets, in the order of `widgets_values`.

    After a seed the browser adds a widget of its own, "control_after_generate", that no node receives.
    """
    names = []
    for name, (kind, options) in inputs(definition).items():
        if kind in WIDGETS and not options.get("forceInput"):
            names.append(name)
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                names.append("control_after_generate")
    return names


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Node id → {"class_type", "inputs"}, for POST /prompt; a link is [node id, output index].

    Raises ValueError for a node that `object_info` lacks, one that is bypassed, a drawing node in the way of
    a link, and a number of widget values that is not the schema's.
    """
    sources = {link: [str(source), slot] for link, source, slot, *_ in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        kind, title = node["type"], f"node {node['id']} ({node['type']})"
        if kind in DRAWN_BY_THE_BROWSER and not node["outputs"]:
            continue
        if kind not in object_info:
            raise ValueError(f"{title} is unknown to this ComfyUI; install the node pack that brings it")
        if node.get("mode", 0) in BYPASSED:
            raise ValueError(f"{title} is muted or bypassed; only the browser can resolve that")
        names, values = widgets(object_info[kind]), node.get("widgets_values") or []
        if len(names) != len(values):
            raise ValueError(f"{title} has {len(values)} widget values, its schema {len(names)}: {', '.join(names)}")
        given = dict(zip(names, values, strict=True))
        given.pop("control_after_generate", None)
        linked = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        prompt[str(node["id"])] = {"class_type": kind, "inputs": given | linked}
    return prompt
