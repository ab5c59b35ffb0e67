"""How far the approximate methods drift from the exact picture, over patches and exact first steps."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_xdit.demo import assets, conditioning
from comfy_xdit.demo.pictures import as_pictures, contact_sheet
from comfy_xdit.demo.sampling import MODEL_KEY, Settings, by_length, decode, load_model, load_vae
from comfy_xdit.demo.words import PROMPTS
from comfy_xdit.messages import Sample, SetPatches
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool

from .bench_pool import bench_pool
from .program import euler
from .show import json_argument, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One method with its settings. num_patches: None where it has none."""

    spec: ParallelSpec
    num_patches: int | None
    warmup_steps: int

    @property
    def title(self) -> str:
        patches = f", {self.num_patches} patches" if self.num_patches else ""
        return f"{self.spec}{patches}, {self.warmup_steps} exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """Pictures of a case against the exact ones. psnr_db: of all pictures together, infinite when equal."""

    case: Case
    pictures: Tensor
    psnr_db: float
    max_difference: float


def drift(
    *, num_ranks: int = 2, patches: Sequence[int] = (2, 4, 8), warmups: Sequence[int] = (1, 2, 4), settings: Settings
) -> tuple[Tensor, list[Drift]]:
    """The exact pictures, and each case's: PipeFusion over patches and warm-up, DistriFusion over warm-up.

    Pictures are [prompts, 3, side, side] in about -1..1; differences are of their 0..255.
    """
    assets.check()
    cases = [
        Case(spec=ParallelSpec(pipe=num_ranks), num_patches=number, warmup_steps=warmup)
        for number in patches
        for warmup in warmups
    ]
    cases += [Case(spec=ParallelSpec(distri=num_ranks), num_patches=None, warmup_steps=warmup) for warmup in warmups]
    found = []
    with bench_pool(num_ranks) as pool, pool.lease():
        load_vae(pool)
        exact = sampled(pool, Case(spec=ParallelSpec(ulysses=num_ranks), num_patches=None, warmup_steps=0), settings)
        for case in cases:
            pictures = sampled(pool, case, settings)
            found.append(compared(case, pictures, exact))
    return exact, found


def sampled(pool: Pool, case: Case, settings: Settings) -> Tensor:
    """Pictures of all prompts, sampled on the workers."""
    load_model(pool, case.spec)
    pool.call(SetPatches(model=MODEL_KEY, patches_id="", patches=[]))
    side = settings.side // assets.PIXELS
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(len(settings.prompts), assets.CHANNELS, side, side, generator=generator)
    latents = torch.empty_like(noise)
    for prompts in by_length(settings.prompts).values():
        places = [settings.prompts.index(prompt) for prompt in prompts]
        latents[places] = pool.call(_message(case, settings, prompts, noise[places])).value
    return decode(pool, latents / assets.SCALE + assets.SHIFT)


def _message(case: Case, settings: Settings, prompts: Sequence[str], noise: Tensor) -> Sample:
    loaded = [conditioning.load(str(assets.CONDITIONING), prompt) for prompt in prompts]
    context = torch.cat([context for context, _ in loaded])
    pooled = torch.cat([pooled for _, pooled in loaded if pooled is not None])
    positive = {"context": context, "y": pooled}
    return Sample(
        job="drift",
        model=MODEL_KEY,
        patches_id="",
        spec=case.spec,
        program=euler(settings.num_steps, cfg=settings.cfg),
        noise=noise,
        latent=torch.zeros_like(noise),
        mask=None,
        noises=[],
        conds=[positive, {name: torch.zeros_like(value) for name, value in positive.items()}],
        num_patches=case.num_patches or 0,
        warmup_steps=case.warmup_steps,
    )


def compared(case: Case, pictures: Tensor, exact: Tensor) -> Drift:
    """Of pictures as they are seen: within 0 and 255."""
    ours, theirs = ((x.clamp(-1, 1) + 1) * 127.5 for x in (pictures, exact))
    error = float((ours - theirs).square().mean())
    psnr_db = float(10 * torch.log10(torch.tensor(255.0**2 / error))) if error else float("inf")
    return Drift(
        case=case, pictures=pictures, psnr_db=psnr_db, max_difference=float((ours - theirs).abs().max())
    )


def plot(found: list[Drift], file: Path) -> None:
    """PSNR over exact first steps, a line for each method and number of patches. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[Drift]] = {}
    for entry in found:
        name = str(entry.case.spec)
        if entry.case.num_patches:
            name += f", {entry.case.num_patches} patches"
        lines.setdefault(name, []).append(entry)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, entries in lines.items():
        steps = [entry.case.warmup_steps for entry in entries]
        axes.plot(steps, [entry.psnr_db for entry in entries], marker="o", label=name)
    axes.set_xticks(sorted({entry.case.warmup_steps for entry in found}))
    axes.set_xlabel("exact first steps")
    axes.set_ylabel("PSNR against the exact picture (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    json_argument(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a plot and a contact sheet here")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--patches", type=int, nargs="+", default=[2, 4, 8], help="of PipeFusion (default: 2 4 8)")
    parser.add_argument("--warmup", type=int, nargs="+", default=[1, 2, 4], help="exact first steps (default: 1 2 4)")
    parser.add_argument("--steps", type=int, default=20, help="steps per picture (default: 20)")
    parser.add_argument("--prompts", type=int, default=4, help=f"how many of the demo's {len(PROMPTS)} (default: 4)")


def run(args: argparse.Namespace) -> int:
    """Sample, compare, print and draw. Raises ValueError for numbers that make no job."""
    for name, least in (("ranks", 2), ("steps", 1), ("prompts", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is too few; use {least} or more")
    settings = Settings(prompts=PROMPTS[: args.prompts], num_steps=args.steps)
    exact, found = drift(num_ranks=args.ranks, patches=args.patches, warmups=args.warmup, settings=settings)
    rows = [
        {
            "method": str(entry.case.spec),
            "patches": entry.case.num_patches,
            "exact_steps": entry.case.warmup_steps,
            "psnr_db": entry.psnr_db,
            "max_difference": entry.max_difference,
        }
        for entry in found
    ]
    compared_with = (
        f"{len(settings.prompts)} pictures of {settings.side} x {settings.side} by the demo's Flux, "
        f"{settings.num_steps} steps, {args.ranks} ranks: against exact ones; differences of 0..255"
    )
    result: dict[str, Any] = {"compared": compared_with, "rows": rows}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(found, args.out / "drift.png")
        sheet = [as_pictures(exact), *(as_pictures(entry.pictures) for entry in found)]
        titles = ["exact", *(entry.case.title for entry in found)]
        contact_sheet(sheet, list(settings.prompts), titles).save(args.out / "drift-sheet.png")
        result["pictures"] = str(args.out)
    return show(result, as_json=args.json)
