"""No module needs itself through others, and no folder does.

Imports in functions count: they put a circle off, and don't break it. Those under TYPE_CHECKING don't: a type's name
makes no module need another to run.
"""

import ast
from pathlib import Path

import pytest

from comfy_xdit.mount import IN_CHECKOUT

ROOT = Path(__file__).resolve().parents[1]


def modules(folders=IN_CHECKOUT, root=ROOT):
    """Import name → file of every module of ours."""
    found = {}
    for package, folder in folders.items():
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(name, path, known):
    """Those of `known` that module `name` imports, at its top or in a function, but not for types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    waiting = [ast.parse(path.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & known | ({base} if names - known else set())
    return found & known - {name}


def circles(edges):
    """The sets of names that each reach each other."""

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            for other in edges[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {name: reached(name) for name in edges}
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in edges}
    return [set(circle) for circle in found if circle]


def folders_of(edges):
    """The same edges between what lies directly in a package: `comfy_xdit.pool`, `comfy_xdit.messages`."""

    def part(name):
        return ".".join(name.split(".")[:2])

    found = {part(name): set() for name in edges}
    for name, others in edges.items():
        found[part(name)] |= {part(other) for other in others} - {part(name)}
    return found


@pytest.fixture(scope="module")
def edges():
    known = modules()
    return {name: imported(name, path, set(known)) for name, path in known.items()}


def test_modules_make_no_circle(edges):
    assert len(edges) > 150 and circles(edges) == []


def test_folders_make_no_circle(edges):
    inside = {name: others for name, others in edges.items() if name.startswith("comfy_xdit.")}
    inside = {name: {other for other in others if other in inside} for name, others in inside.items()}
    assert not circles(folders_of(inside))


def test_a_circle_is_found(tmp_path):
    sources = {
        "a.py": "def f():\n    from .deep import b",
        "deep/__init__.py": "",
        "deep/b.py": "from ..c import g",
        "c.py": "import ours.a",
        "d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .e import E",
        "e.py": "from . import d",
    }
    for name, source in sources.items():
        (tmp_path / "ours" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "ours" / name).write_text(source)
    known = modules({"ours": "ours"}, tmp_path)
    edges = {name: imported(name, path, set(known)) for name, path in known.items()}
    assert circles(edges) == [{"ours.a", "ours.deep.b", "ours.c"}]
    assert circles(folders_of(edges)) == [{"ours.a", "ours.deep", "ours.c"}]
