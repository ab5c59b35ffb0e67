"""Pictures from a tiny Flux, on one rank and on all of them, and whether they agree."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from comfy_xdit.messages import Patch
from comfy_xdit.models import comfy_layout, detect
from comfy_xdit.models.lora_file import read_lora
from comfy_xdit.parallel.spec import ModelShape, ParallelSpec, check
from comfy_xdit.pool.client import Pool
from comfy_xdit.pool.devices import describe, parse_devices
from comfy_xdit.pool.stop import stop
from comfy_xdit.timeline.chrome import chrome_trace
from comfy_xdit.timeline.picture import timeline
from comfy_xdit.weights.header import read_header

from . import assets
from .pictures import as_pictures, contact_sheet
from .sampling import Sampled, Settings, decode, load_model, load_vae, sample
from .words import PROMPTS

LORA_ID = "outlined"
TOLERANCE = 1e-3
"""Of the latent's largest value: sums in another order, over all the steps of a sampler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: all prompts, without and with the LoRA."""

    mode: str
    num_ranks: int
    plain: Sampled
    outlined: Sampled

    @property
    def seconds(self) -> float:
        return self.plain.seconds + self.outlined.seconds


def run(args: argparse.Namespace) -> int:
    """Sample, decode, compare, write; the exit status is 1 when a mode's latents differ from one rank's."""
    assets.check()
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} makes no picture; use 1 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.comfyui is not None:
        from .through_comfyui import run as run_comfyui

        return run_comfyui(args)
    settings = Settings(prompts=PROMPTS, num_steps=args.steps)
    devices = parse_devices(args.devices)
    infos = read_header(str(assets.MODEL))
    family, _ = detect(infos)
    patches = read_lora(str(assets.LORA), family, infos)
    with share_of_cores(len(devices)), demo_pool("demo-one", devices[:1]) as pool:
        rows = [measure(pool, settings, patches, ParallelSpec(), trace=bool(args.trace))]
        images = decode_both(pool, rows[0])
    drift = 0.0
    if len(devices) > 1:
        shape = family.shape(family.config(comfy_layout(family, infos)[0]))
        with demo_pool("demo", devices) as pool:
            specs = modes(len(devices), shape)
            rows += [measure(pool, settings, patches, spec, trace=bool(args.trace)) for spec in specs]
            parallel = decode_both(pool, rows[1])
        drift = max(difference(ours, one) for ours, one in zip(parallel, images, strict=True))
        images = parallel
    write(args.out, settings, rows, images)
    if args.trace:
        args.trace.write_text(json.dumps(chrome_trace({row.mode: row.plain for row in rows})))
    sys.stdout.write(table(rows, settings))
    if len(devices) > 1:
        sys.stdout.write(f"VAE decode on {len(devices)} ranks: images differ by at most {drift * 127.5:.3f} of 255\n")
    sys.stdout.write(f"Pictures, contact sheet and timeline: {args.out.resolve()}\n")
    return 0 if all(row_difference(row, rows[0]) <= TOLERANCE for row in rows) else 1


@contextlib.contextmanager
def share_of_cores(num_ranks: int) -> Iterator[None]:
    """What is started inside has the cores that one of `num_ranks` ranks would have, where the system can.

    One rank on the CPU would else use all cores, and be compared with itself.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[: max(1, len(cores) // num_ranks)])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def demo_pool(name: str, devices: list[str]) -> Iterator[Pool]:
    """A pool of the demo's own with its models loaded, for one lease; it ends with the block."""
    sys.stdout.write(f"starting pool {name!r} on {describe(devices)}\n")
    sys.stdout.flush()
    pool = Pool.connect(name, describe(devices))
    try:
        with pool.lease():
            load_model(pool)
            load_vae(pool)
            yield pool
    finally:
        pool.close()
        with contextlib.suppress(ConnectionError):
            stop(name)


def modes(num_ranks: int, shape: ModelShape) -> list[ParallelSpec]:
    """Each method on all ranks, and products of two, as far as model and number of ranks allow."""
    candidates = [{axis: num_ranks} for axis in ("ulysses", "ring", "cfg", "dp")]
    if num_ranks % 2 == 0 and num_ranks > 2:
        half = num_ranks // 2
        candidates += [{"cfg": 2, "ulysses": half}, {"cfg": 2, "ring": half}, {"ulysses": 2, "ring": half}]
    specs = [ParallelSpec(**degrees) for degrees in candidates]
    return [spec for spec in specs if not check(spec, num_ranks=num_ranks, shape=shape)]


def measure(
    pool: Pool, settings: Settings, patches: list[Patch], spec: ParallelSpec, *, trace: bool = False
) -> Row:
    """All prompts in both styles; a step beforehand makes the process groups and warms the kernels."""
    sys.stdout.write(f"  {spec}\n")
    sys.stdout.flush()
    sample(pool, dataclasses.replace(settings, num_steps=1), spec)
    plain = sample(pool, settings, spec, trace=trace)
    outlined = sample(pool, settings, spec, patches_id=LORA_ID, patches=patches)
    return Row(mode=str(spec), num_ranks=spec.num_ranks, plain=plain, outlined=outlined)


def decode_both(pool: Pool, row: Row) -> list[Tensor]:
    return [decode(pool, row.plain.latents), decode(pool, row.outlined.latents)]


def difference(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).abs().max())


def row_difference(row: Row, reference: Row) -> float:
    """Largest difference of any latent's value, as a part of the largest value."""
    pairs = ((row.plain, reference.plain), (row.outlined, reference.outlined))
    return max(difference(a.latents, b.latents) / float(b.latents.abs().max()) for a, b in pairs)


def table(rows: list[Row], settings: Settings) -> str:
    """Seconds and differences of each mode, against one rank."""
    num = 2 * len(settings.prompts)
    lines = [
        f"\n{num} pictures of {settings.side} x {settings.side}, {settings.num_steps} steps, half with the LoRA",
        f"{'mode':<24}{'ranks':>6}{'seconds':>10}{'speed':>8}{'max difference':>16}",
    ]
    for row in rows:
        speed = rows[0].seconds / row.seconds
        lines.append(
            f"{row.mode:<24}{row.num_ranks:>6}{row.seconds:>10.2f}{speed:>7.2f}x{row_difference(row, rows[0]):>16.1e}"
        )
    return "\n".join(lines) + "\n"


def write(out: Path, settings: Settings, rows: list[Row], images: list[Tensor]) -> None:
    """Every picture, a contact sheet with the prompts above, and what each rank did when."""
    styles = {"plain": as_pictures(images[0]), "outlined": as_pictures(images[1])}
    for style, pictures in styles.items():
        for prompt, picture in zip(settings.prompts, pictures, strict=True):
            picture.save(out / f"{prompt.replace(' ', '-')}-{style}.png")
    titles = ["Flux", "Flux with LoRA"]
    contact_sheet(list(styles.values()), list(settings.prompts), titles).save(out / "contact-sheet.png")
    timeline({row.mode: row.plain for row in rows}).save(out / "timeline.png")
