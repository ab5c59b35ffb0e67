"""Whether a pool runs a template, by what its files and nodes are called; nothing is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .graph import Template
from .names import CARRIED, CONDITIONS, NOT_DIFFUSION, family_of_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """families: that run its files. why: what a pool does not run; "" where it runs all."""

    template: Template
    families: tuple[str, ...]
    why: str

    @property
    def runs(self) -> bool:
        return not self.why


def is_sampling(template: Template) -> bool:
    """Whether it samples with a diffusion model from a file, and not over the network alone."""
    return bool(template.samplers and _models(template))


def verdict(template: Template) -> Verdict:
    families, faults = set(), []
    for file in _models(template):
        family = family_of_file(file)
        if family:
            families.add(family)
        else:
            faults.append(f"no plan for {file}")
    faults += [f"node {name}" for name in template.patches if name not in CARRIED]
    faults += [f"node {name}" for name in template.conditioning if name not in CONDITIONS]
    return Verdict(template=template, families=tuple(sorted(families)), why="; ".join(dict.fromkeys(faults)))


def share(verdicts: Sequence[Verdict]) -> float:
    """Of all usage, that of templates that run."""
    total = sum(one.template.usage for one in verdicts)
    return sum(one.template.usage for one in verdicts if one.runs) / total if total else 0.0


def _models(template: Template) -> list[str]:
    return [file for file in template.files if not NOT_DIFFUSION.search(file)]
