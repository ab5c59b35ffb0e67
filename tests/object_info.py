"""The schemas of the nodes that the bundled workflows use, as `tests/data/object_info.json` keeps them.

The file is a subset of what ComfyUI serves under `/object_info`, so that the workflows can be checked where
there is no ComfyUI. To renew it, start the oldest supported ComfyUI with this node pack and run
`python tests/object_info.py http://127.0.0.1:8188`.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "tests" / "data" / "object_info.json"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

FOLDERS = {
    "ckpt_name": "checkpoints",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "clip_name3": "text_encoders",
    "lora_name": "loras",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
}
"""Inputs that choose a file → the folder under ComfyUI's models/ that they list."""

NOTES = ("Note", "MarkdownNote")
"""Drawn by the browser; no node of the server."""


def node_types(workflows: list[dict[str, Any]]) -> list[str]:
    return sorted({node["type"] for workflow in workflows for node in workflow["nodes"]} - set(NOTES))


def trimmed(definition: dict[str, Any]) -> dict[str, Any]:
    """One node's schema without its tooltips and this machine's files; choices as a plain list."""

    def trim(name: str, kind: Any, options: dict[str, Any]) -> list[Any]:
        if kind == "COMBO":
            kind = options["options"]
        if name in FOLDERS:
            kind = []
        wanted = ("default", "min", "max", "step", "forceInput", "control_after_generate", "multiline")
        return [kind, {key: options[key] for key in wanted if key in options}]

    return {
        "display_name": definition["display_name"] or definition["name"],
        "input": {
            group: {name: trim(name, kind, *(rest or [{}])) for name, (kind, *rest) in members.items()}
            for group, members in definition["input"].items()
            if group != "hidden"
        },
        "output": definition["output"],
        "output_name": definition["output_name"],
    }


def snapshot(object_info: dict[str, Any], types: list[str]) -> dict[str, Any]:
    return {name: trimmed(object_info[name]) for name in types}


def differences(kept: dict[str, Any], host: dict[str, Any]) -> list[str]:
    """What a workflow made for `kept` would meet on a `host` that differs, as sentences.

    A later ComfyUI may offer more choices, more outputs, and more optional inputs after the known ones.
    """
    found = []
    for node, ours in kept.items():
        theirs = host[node]
        for group in ("required", "optional"):
            mine, given = ours["input"].get(group, {}), theirs["input"].get(group, {})
            known = list(given) if group == "required" else list(given)[: len(mine)]
            if list(mine) != known:
                found.append(f"{node}: {group} inputs {known} instead of {list(mine)}")
                continue
            for name, (kind, options) in mine.items():
                kind_now, options_now = given[name]
                same = set(kind) <= set(kind_now) if isinstance(kind, list) else kind == kind_now
                if not same:
                    found.append(f"{node}.{name}: {kind_now} instead of {kind}")
                default, default_now = options.get("default"), options_now.get("default")
                if default != default_now:
                    found.append(f"{node}.{name}: default {default_now!r} instead of {default!r}")
        if theirs["output"][: len(ours["output"])] != ours["output"]:
            found.append(f"{node}: outputs {theirs['output']} instead of {ours['output']}")
    return found


def main(url: str) -> None:
    workflows = [json.loads(path.read_text("utf-8")) for path in WORKFLOWS]
    with urllib.request.urlopen(f"{url}/object_info") as answer:
        kept = snapshot(json.load(answer), node_types(workflows))
    SNAPSHOT.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
