"""Which part may import what: it keeps the workers free of ComfyUI, and ComfyUI free of the workers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMFYUI = {
    *("comfy", "comfy_extras", "comfy_api", "comfy_execution", "comfy_config", "folder_paths", "node_helpers"),
    *("nodes", "server", "execution", "latent_preview", "app", "protocol"),
}
BESIDE = {"comfy_xdit_bench", "comfy_xdit_training", "bench", "training"}
"""What measures and what made the demo: nothing that a job needs."""

NATIVE = "comfy_xdit/native"
"""The one folder of the workers' that imports ComfyUI's model classes, and inside of functions only."""

FORBIDDEN = {
    "comfy_xdit": COMFYUI | BESIDE | {"comfy_xdit_nodes", "comfy_xdit_worker", "worker"},
    NATIVE: (COMFYUI - {"comfy"}) | BESIDE | {"comfy_xdit_nodes", "comfy_xdit_worker", "worker"},
    "worker": COMFYUI | BESIDE | {"comfy_xdit_nodes"},
    "nodes": BESIDE | {"comfy_xdit_worker", "worker"},
    "nodes/parity": {"comfy_xdit_worker", "worker"},
    "bench": COMFYUI | {"comfy_xdit_nodes", "comfy_xdit_worker", "worker"},
    "training": COMFYUI | {"comfy_xdit_nodes", "comfy_xdit_worker", "worker", "comfy_xdit_bench"},
}
"""Folder → what its files must not import; a folder in it may have rules of its own."""

LAZY = {"diffusers", "distvae", "flash_attn", "flash_attn_interface"}
"""Slow to import, or not everywhere: never needed to list the nodes or to read a header."""


def imports(tree):
    """(top-level package or "." for each leading dot's level, node) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], 0, node
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level, node


def ruled_by(path):
    """The innermost folder with rules that `path` is in."""
    return max((folder for folder in FORBIDDEN if (ROOT / folder) in path.parents), key=len)


def files(folder):
    found = [path for path in sorted((ROOT / folder).rglob("*.py")) if ruled_by(path) == folder]
    assert found
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


def faults(folder, path, source):
    """What `source`, the text of the file `path` in `folder`, imports against the rules."""
    tree = ast.parse(source)
    depth = len(path.relative_to(ROOT / folder).parts)
    found = []
    for name, level, node in imports(tree):
        if level == 0 and name in FORBIDDEN[folder]:
            found.append(f"line {node.lineno}: {folder} must not import {name}")
        if level > depth or (folder.startswith("nodes") and level > 1):
            found.append(f"line {node.lineno}: a relative import that leaves its folder")
    found += [
        f"line {node.lineno}: {name} is imported at the top, not in the function that needs it"
        for name, level, node in imports(ast.Module([n for n in tree.body if not guarded(n)], []))
        if level == 0 and name in (LAZY | {"comfy"} if folder == NATIVE else LAZY) and node in tree.body
    ]
    return found


def guarded(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


@pytest.mark.parametrize(
    ("folder", "path"),
    [pytest.param(folder, *p.values, id=p.id) for folder in FORBIDDEN for p in files(folder)],
)
def test_rules(folder, path):
    assert faults(folder, path, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("comfy_xdit", "import comfy.sd"),
        ("comfy_xdit", "def f():\n    from nodes import KSampler"),
        ("comfy_xdit", "from ..nodes import pool"),
        ("comfy_xdit", "import diffusers"),
        ("comfy_xdit", "def f():\n    import comfy.ops"),
        (NATIVE, "import comfy.ops"),
        (NATIVE, "def f():\n    import folder_paths"),
        ("comfy_xdit", "from comfy_xdit_bench.timing import ratio"),
        ("worker", "import folder_paths"),
        ("nodes", "from comfy_xdit_bench.modes import modes"),
        ("nodes", "from ..comfy_xdit import messages"),
        ("nodes", "from .pool import PoolSetting\nfrom comfy_xdit_worker import service"),
    ],
)
def test_the_rules_find_what_they_forbid(folder, source):
    assert faults(folder, ROOT / folder / "example.py", source)


def test_the_root_mounts_and_imports_the_nodes_only():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    assert {name for name, _, _ in imports(tree)} <= {"runpy", "pathlib", "comfy_xdit_nodes"}
    assert not [level for _, level, _ in imports(tree) if level]


def test_mount_needs_nothing_but_the_standard_library():
    tree = ast.parse((ROOT / "comfy_xdit" / "mount.py").read_text("utf-8"))
    assert {name for name, _, _ in imports(tree)} <= {"importlib", "sys", "pathlib"}
