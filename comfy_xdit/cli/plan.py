"""`comfy-xdit plan`: which spec suits a model, a size and a link; reads the checkpoint's header only."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from typing import Any

from comfy_xdit.cost.arithmetic import Network, read_network
from comfy_xdit.cost.choose import Prediction, predict, predictions
from comfy_xdit.cost.links import DEVICES, LINKS, Device, Links, Machines, device_named, link_named
from comfy_xdit.cost.work import Work
from comfy_xdit.parallel.spec import ParallelSpec

SHOWN = 12


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--model", required=True, metavar="FILE", help="checkpoint; only its header is read")
    parser.add_argument("--size", default="1024x1024", help="width x height in pixels (default: 1024x1024)")
    parser.add_argument("--steps", type=int, default=28, help="steps of the sampler (default: 28)")
    parser.add_argument("--devices", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--link", default="nvlink", help=f"{', '.join(LINKS)}, or ethernet-25 for 25 Gbit/s")
    parser.add_argument("--machines", type=int, default=1, help="that the devices are on, as many on each (default: 1)")
    parser.add_argument("--network", help="between machines, of which a machine's devices share one: as --link")
    parser.add_argument("--device", default="a100", help=f"{', '.join(DEVICES)} (default: a100)")
    parser.add_argument("--pool", metavar="NAME", help="link and device as that pool measured them")
    parser.add_argument("--images", type=int, default=1, help="pictures at a time (default: 1)")
    parser.add_argument("--chunks", type=int, help="2 with cond and uncond, 1 without (default: as the model is used)")
    parser.add_argument("--text-tokens", type=int, help="of the prompt (default: as the model's encoders pad it)")
    parser.add_argument("--warmup", type=int, default=1, help="exact steps of approximate methods (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--all", action="store_true", help=f"all specs, not the best {SHOWN}")


def run(args: argparse.Namespace) -> int:
    """Predict and print. Raises ValueError for what makes no plan."""
    network = read_network(args.model)
    work = work_of(network, args)
    link, device = links_of(args)
    found = predictions(network, work, args.devices, link, device)
    if not found:
        raise ValueError(f"no spec makes {args.devices} ranks for {network.title}; use another number of devices")
    alone = predict(network, work, ParallelSpec(), link, device)
    result = {
        "model": network.title,
        "parameters": network.params,
        "flops_per_evaluation": work.rows * network.flops(work.tokens(network)),
        "link": link.name,
        "device": device.name,
        "alone": row(alone, alone),
        "specs": [row(prediction, alone) for prediction in (found if args.all else found[:SHOWN])],
        "why": reasons(network, work, found, alone, link, device),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if args.json else text(result, args))
    return 0


def work_of(network: Network, args: argparse.Namespace) -> Work:
    """The work that the arguments describe. Raises ValueError for numbers that make none."""
    size = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if size is None or "0" in size.groups():
        raise ValueError(f"--size {args.size!r} is no size; use width x height in pixels, as 1024x1024")
    for name in ("steps", "devices", "images", "text_tokens", "warmup"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} makes no job; use 1 or more")
    if args.chunks not in (None, 1, 2):
        raise ValueError(f"--chunks {args.chunks} is neither 1 nor 2 (cond and uncond)")
    width, height = (-(-int(side) // network.latent_pixel) for side in size.groups())
    return Work(
        latent=(height, width),
        text_tokens=network.text_tokens if args.text_tokens is None else args.text_tokens,
        images=args.images,
        chunks=args.chunks or (1 if network.guided else 2),
        num_evaluations=args.steps,
        warmup=args.warmup,
    )


def links_of(args: argparse.Namespace) -> tuple[Links, Device]:
    """By name, or as a pool measured them. Raises ValueError for unknown names, and machines of unequal size."""
    if args.pool:
        from comfy_xdit.cost.measured import read

        return read(args.pool)
    link, device = link_named(args.link), device_named(args.device)
    if args.machines == 1 and args.network is None:
        return link, device
    if args.machines < 1 or args.devices % args.machines or args.network is None:
        raise ValueError(
            f"--machines {args.machines} --network {args.network} do not fit {args.devices} devices; use a number of "
            "machines that divides them, and the network between them, e.g. ethernet-100"
        )
    num_local = args.devices // args.machines
    shared = link_named(args.network)
    across = dataclasses.replace(shared, bytes_per_s=shared.bytes_per_s / num_local)
    return Machines(name=f"{link.name} and {shared.name}", within=link, across=across, num_local=num_local), device


def row(prediction: Prediction, alone: Prediction) -> dict[str, Any]:
    """A prediction as numbers for JSON."""
    return {
        "spec": str(prediction.spec),
        "degrees": prediction.spec.degrees,
        "exact": prediction.exact,
        "step_s": prediction.step_s,
        "speedup": alone.step_s / prediction.step_s,
        "waiting_s": prediction.waiting_s,
        "sent_bytes": prediction.sent_bytes,
        "parameter_bytes": prediction.memory.parameters,
        "activation_bytes": prediction.memory.activations,
        "buffer_bytes": prediction.memory.buffers,
        "memory_bytes": prediction.memory.total,
        "fits": prediction.fits,
        "balance": prediction.balance,
        "idle_ranks": prediction.num_idle,
    }


def reasons(
    network: Network, work: Work, found: list[Prediction], alone: Prediction, link: Links, device: Device
) -> list[str]:
    """Why the first is first, and what stands against others."""
    best = found[0]
    share = best.waiting_s / best.step_s if best.step_s else 0.0
    said = [
        f"{best.spec} is predicted fastest: {best.step_s:.3g} s a step, {alone.step_s / best.step_s:.1f} times as fast "
        f"as one rank; it waits {share:.0%} of it for the link, and sends {_size(best.sent_bytes)} a step"
    ]
    exact = next((prediction for prediction in found if prediction.exact), None)
    if best.num_idle:
        said.append(f"{best.num_idle} ranks have nothing to do, and still {link.name} would cost the others more")
    if not best.exact:
        said.append("it approximates: activations of the step before stand in for other ranks' new ones")
        if exact is not None:
            said.append(f"{exact.spec} is the fastest exact one, {exact.step_s / best.step_s:.2f} times as long a step")
    elif len(found) > 1:
        other = found[1]
        reason = (
            f"sends {_size(other.sent_bytes)} and waits {other.waiting_s:.3g} s of {other.step_s:.3g} s"
            if other.fits
            else f"needs {_size(other.memory.total)} of {_room(device)}"
        )
        said.append(f"next is {other.spec}: it {reason}")
    slowest = max(found, key=lambda prediction: prediction.step_s)
    if slowest.step_s > 1.5 * best.step_s:
        said.append(
            f"{slowest.spec} takes {slowest.step_s / best.step_s:.1f} times as long: "
            f"{_size(slowest.sent_bytes)} a step over {link.name} ({_size(link.bytes_per_s)}/s)"
        )
    moved = [prediction for prediction in found if prediction.balance == "memory"]
    if moved:
        said.append(
            f"stages of equal time hold unequal weights: {len(moved)} of {len(found)} specs fit "
            f"{_room(device)} only with stages of equal weights (balance = memory), which are slower"
        )
    short = [prediction for prediction in found if not prediction.fits]
    if short:
        said.append(
            f"{len(short)} of {len(found)} specs do not fit {_room(device)}; they are listed last "
            "whatever their time"
        )
    return said


def text(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The plan for people."""
    lines = [
        f"{result['model']}, {result['parameters'] / 1e9:.2f} billion parameters, "
        f"{result['flops_per_evaluation'] / 1e12:.1f} TFLOP an evaluation; "
        f"{args.size}, {args.steps} steps, {args.devices} x {result['device']} over {result['link']}",
        "",
        f"{'spec':<32}{'step':>10}{'speed':>8}{'waiting':>9}{'sent':>10}{'weights':>10}{'acts':>9}{'buffers':>9}",
    ]
    for entry in [result["alone"], *result["specs"]]:
        marks = "" if entry["exact"] else "  approximate"
        marks += f"  {entry['idle_ranks']} ranks idle" if entry["idle_ranks"] else ""
        marks += "  balance = memory" if entry["balance"] == "memory" else ""
        marks += "" if entry["fits"] else "  does not fit"
        lines.append(
            f"{entry['spec']:<32}{entry['step_s']:>8.3g} s{entry['speedup']:>7.2f}x"
            f"{entry['waiting_s'] / entry['step_s']:>9.0%}{_size(entry['sent_bytes']):>10}"
            f"{_size(entry['parameter_bytes']):>10}{_size(entry['activation_bytes']):>9}"
            f"{_size(entry['buffer_bytes']):>9}{marks}"
        )
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {sentence}" for sentence in result["why"]) + "\n"


def _room(device: Device) -> str:
    reserved = device.memory_bytes - device.room_bytes
    return f"{_size(device.room_bytes)} ({_size(device.memory_bytes)}, of which {_size(reserved)} are left free)"


def _size(num_bytes: float) -> str:
    for unit, limit in (("B", 1e3), ("kB", 1e6), ("MB", 1e9), ("GB", 1e12)):
        if num_bytes < limit:
            return f"{num_bytes / (limit / 1e3):.3g} {unit}"
    return f"{num_bytes / 1e12:.3g} TB"
