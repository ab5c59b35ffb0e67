"""What the user docs say exists: links, commands and their options, node ids, and the errors they quote."""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

from comfy_xdit.cli import COMMANDS
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.pool import client, connections, devices, failure_policy, folder, membership, pace, silence, starts

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md")) + [page for page in [ROOT / "README.md"] if page.is_file()]
NODES = set(re.findall(r'"(XDiT\w+)": XDiT', (ROOT / "nodes" / "__init__.py").read_text("utf-8")))
MIN_WORDS = 4
"""Fewer words in a row would be found anywhere."""


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            found = (page.parent / path) if path else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}


def test_every_node_is_described():
    headings = "\n".join(re.findall(r"^## (.+)$", text("nodes.md"), re.MULTILINE))
    assert len(NODES) >= 8 and set(re.findall(r"XDiT\w+", headings)) == NODES


def test_every_node_has_its_help_page():
    assert sorted(NODES) == sorted(page.stem for page in (ROOT / "web" / "docs").glob("XDiT*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    for line in re.findall(r"comfy[-_]xdit ((?:pool|bench|selftest|draft-plan)[^`\n]*)", page.read_text("utf-8")):
        name = next((name for name in COMMANDS if line.startswith(name)), None)
        assert name is not None, f"{page.name}: {line}"
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[name][0]).arguments(parser)
        for option in re.findall(r"--[a-z-]+", line):
            assert option in parser.format_help(), f"{page.name}: {line}"


def fragments() -> set[str]:
    """Runs of words in the project's string literals, as they stand between the values put in."""
    found = set()
    for part in ("comfy_xdit", "nodes", "worker", "bench"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value.strip(" ();:,'"))
    return {fragment for fragment in found if len(fragment.split()) >= MIN_WORDS}


def test_quoted_errors_are_the_codes():
    quotes = [line[2:] for line in text("troubleshooting.md").splitlines() if line.startswith("> ")]
    known = fragments()
    unknown = [quote for quote in quotes if not any(fragment in quote for fragment in known)]
    assert len(quotes) >= 15 and not unknown


def test_every_family_is_in_the_table_of_models():
    rows = {row.split(" | ")[0].strip("| "): row for row in text("models.md").splitlines() if row.startswith("| ")}
    assert rows.keys() == {"model"} | {family.title for family in FAMILIES.values()}
    for family in FAMILIES.values():
        _, kinds, arguments, _ = rows[family.title].strip("| ").split(" | ")
        assert re.findall(r"`(\w+)`", kinds) == [*family.kinds]
        assert re.findall(r"`(\w+)`", arguments) == [*family.rows, *family.constants, *family.options]


def test_limits_are_the_codes():
    pool, trouble, nodes = text("pool.md"), text("troubleshooting.md"), text("nodes.md")
    assert f"{membership.HEARTBEAT_TIMEOUT_S:.0f} s without a sign of life" in pool
    assert f"{failure_policy.STUCK_AFTER_S:.0f} s when its peers have failed" in pool
    assert f"After {silence.TELL_AFTER_S:.0f} s of silence" in pool
    assert f"After {silence.TAKE_AFTER_S:.0f} s, if somebody waits" in pool
    assert f"its limit ({client.CALL_TIMEOUT_S:.0f} s)" in pool
    assert starts.MAX_FAILED_STARTS == 3 and "after three failed starts" in pool
    assert f"up to {pace.LONGEST_PAUSE_S:.0f} s" in pool
    assert f"who is silent for {connections.NEWCOMER_LIMIT_S:.0f} s is dropped" in pool
    assert devices.MAX_AUTO_CPU_RANKS == 4
    assert "per core, at most 4" in pool and "per core, at most 4" in nodes
    assert f"at most {folder.MAX_SOCKET_PATH_BYTES} bytes" in trouble
