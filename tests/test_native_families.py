"""Families of ComfyUI's own classes as data: short, whole, and each with something to test it on."""

import re
import statistics
from pathlib import Path

import pytest

from comfy_xdit.native import families, subjects
from comfy_xdit.native.families import FAMILIES, family_of
from comfy_xdit.native.subjects import SUBJECTS

MAX_LINES, MOSTLY = 60, 32
"""Lines of code that one family may take, and that most take."""


def lines_of_code(path):
    """Without blank lines, comments, imports and the docstring of the file."""
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    return len([line for line in lines if line and not line.startswith(("#", '"""', "from ", "import "))])


def test_a_family_is_short():
    found = []
    for path in Path(families.__file__).parent.glob("*.py"):
        if path.name == "__init__.py":
            continue
        lines = lines_of_code(path)
        num = len(re.findall(r"^[A-Z]\w+ = (?:ComfyFamily|dataclasses.replace)\(", path.read_text("utf-8"), re.M))
        assert num and lines <= MAX_LINES, f"{path.name}: {lines}"
        found += [lines / num] * num
    assert len(found) == len(FAMILIES)
    assert statistics.median(found) <= MOSTLY


def test_every_kind_has_a_subject():
    assert FAMILIES.keys() == SUBJECTS.keys()
    for name, family in FAMILIES.items():
        assert {subject.kind for subject in SUBJECTS[name]} == set(family.kinds)
        assert all(family_of(kind) is family for kind in family.kinds)
    assert family_of("SDXL") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_an_argument_is_of_one_sort(name):
    family = FAMILIES[name]
    named = [*family.rows, *family.constants]
    assert len(named) == len(set(named))
    # A residual of ControlNet has an entry for each block, and batches of its own.
    assert not {"x", "timestep", "timesteps", "transformer_options", "control"} & set(named)


def test_a_real_configuration_keeps_its_choices_and_gets_small_sizes():
    for subject in (subject for group in SUBJECTS.values() for subject in group):
        real = {**subject.config, "of_the_file": True, subject.small[0]: 4096}
        made = subject.configured(real)
        assert made == {**subject.config, "of_the_file": True}
        assert set(subject.small) <= subject.config.keys(), subjects


def test_what_works_on_conditioning_is_whole_on_every_rank():
    """Its modules run by themselves, without the other ranks: none of their weights may be cut."""
    asked = [family for family in FAMILIES.values() if family.prepares]
    assert {family.name for family in asked} == {"minimax-h3", "ltx-2", "anima"}
    for family in asked:
        blocks = tuple(f"{rule.path}." for rule in family.plan.blocks)
        tensor = family.plan.tensor
        cut = () if tensor is None else (*tensor.columns, *tensor.joined, *tensor.rows, *tensor.fused, *tensor.norms)
        assert all(name.startswith(blocks) for name in cut), family.name
