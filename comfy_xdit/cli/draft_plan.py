"""`comfy-xdit draft-plan`: a first draft of the plan of a model class of ComfyUI's, and whether it holds."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from typing import Any

import torch

from comfy_xdit.errors import InputError
from comfy_xdit.native.boot import version_of
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.selftest import selftest, verdict
from comfy_xdit.native.subject import Subject, as_text, exists
from comfy_xdit.native.subjects import SUBJECTS

from .selftest import comfyui_folder, import_comfy

SUBJECT = '''"""(What it is called)."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, rand, times


def calls(config: Config) -> dict[str, Call]:
    # What ComfyUI's model passes to the transformer: once plainly, and once for each further argument.
    {arguments}
    one = {{"x": rand(1, 16, 11, 13), "timestep": times(0.7), "context": rand(1, 9, 48)}}
    return {{"text": one}}


# As ComfyUI detects the file. Make the sizes small: two blocks, five heads.
CONFIG = {config}
SMALL = ()  # the entries that you made small

SUBJECTS = (Subject(kind="{kind}", config=CONFIG, small=SMALL, calls=calls),)
'''


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--comfyui", required=True, metavar="DIR", help="folder of ComfyUI; run it with its Python")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--file", help="a checkpoint of the new family: prints a file of subjects to begin with")
    what.add_argument("--subjects", metavar="FILE", help="a file of subjects, as in comfy_xdit/native/subjects")
    what.add_argument("--family", choices=FAMILIES, help="draft this one's plan anew")


def run(args: argparse.Namespace) -> int:
    """Print; 1 for a draft that doesn't hold. Raises InputError for what no draft can be made of."""
    folder = comfyui_folder(args.comfyui)
    if args.family:
        name, subjects = args.family, SUBJECTS[args.family]
    elif args.subjects:
        name, subjects = _subjects_of(args.subjects)
    import_comfy(folder)
    torch.set_num_threads(1)
    if args.file:
        sys.stdout.write(_first_subjects(args.file))
        return 0
    here = [subject for subject in subjects if exists(subject.kind)]
    if not here:
        raise InputError(f"ComfyUI {version_of(folder)} has none of {[subject.kind for subject in subjects]}")
    return _drafted(name, here, version_of(folder))


def _drafted(name: str, subjects: list[Subject], version: str) -> int:
    # Here: it takes ComfyUI's classes.
    from comfy_xdit.native.drafting.written import draft

    made = draft(name, subjects)
    sys.stdout.write(made.text)
    outcomes = selftest(made.family, subjects)
    failed = [outcome for outcome in outcomes if not outcome.holds]
    worst = max(outcome.error for outcome in outcomes)
    sys.stdout.write(f"\n# Self-test: {len(outcomes) - len(failed)} of {len(outcomes)} calls hold")
    sys.stdout.write("\n" if failed else f", worst difference {worst:.1e}\n")
    for outcome in failed:
        sys.stdout.write(f"#   {outcome.call}: {outcome.why or outcome.error}\n")
    return int(bool(verdict(made.family, outcomes, version)))


def _subjects_of(path: str) -> tuple[str, tuple[Subject, ...]]:
    """A name for the family, and the file's subjects."""
    found: Any = runpy.run_path(path).get("SUBJECTS")
    if not isinstance(found, tuple) or not found or not all(isinstance(one, Subject) for one in found):
        raise InputError(f"{os.path.basename(path)} has no SUBJECTS, a tuple of Subject; see docs/adding-a-family.md")
    return os.path.splitext(os.path.basename(path))[0], found


def _first_subjects(path: str) -> str:
    """A file of subjects for the model in a checkpoint, with its own sizes."""
    import inspect

    from comfy_xdit.native.load import detected, read

    views, metadata = read(path)
    stand_ins = {key: view.clone() if view.dim() < 2 else view.to("meta") for key, view in views.items()}
    config, weights = detected(stand_ins, metadata)
    if config is None:
        raise InputError(f"this ComfyUI knows no model with the weights of {os.path.basename(path)}; use a newer one")
    config.set_inference_dtype(torch.float32, None)
    net = config.get_model(dict(weights), "", device=torch.device("meta")).diffusion_model
    forward = getattr(net, "_forward", net.forward)
    return SUBJECT.format(
        kind=type(config).__name__,
        config=as_text(config.unet_config),
        arguments=f"# {type(net).__name__}{inspect.signature(forward)}",
    )
