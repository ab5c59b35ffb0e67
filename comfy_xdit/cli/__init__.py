"""The command `comfy-xdit`: finds the module of a command and runs it.

The commands of the pool, the plan and the demo are in this folder; those of the workers, the benchmarks and the
training beside what they run. A command's module has `arguments(parser)`, which adds its arguments, and
`run(args) -> int`, which returns the exit status. It is imported only when its command is given, so that
`pool status` stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from comfy_xdit import __version__
from comfy_xdit.mount import PACKAGES, mount
from comfy_xdit.pool.errors import PoolError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("comfy_xdit.cli.demo", "sample a tiny Flux on one rank and on all, and compare"),
    "demo train": ("comfy_xdit_training.train", "make the demo's files anew: half an hour of one core"),
    "pool start": ("comfy_xdit.cli.pool_start", "start a pool of workers, one process per device"),
    "pool join": ("comfy_xdit_worker.join", "be a worker of a pool on several machines; run by torchrun"),
    "pool status": ("comfy_xdit.cli.pool_status", "show a pool's ranks, models, queue and state"),
    "pool stop": ("comfy_xdit.cli.pool_stop", "end a pool and all of its workers"),
    "selftest": ("comfy_xdit.cli.selftest", "whether the plans of ComfyUI's own models hold for a ComfyUI"),
    "check": ("comfy_xdit.cli.check", "which of ComfyUI's own workflow templates a pool runs"),
    "draft-plan": ("comfy_xdit.cli.draft_plan", "a first draft of the plan of a model class of ComfyUI's"),
    "plan": ("comfy_xdit.cli.plan", "which parallel spec suits a model, a size and a link, and why"),
    "parity": ("comfy_xdit_bench.parity", "N ranks against one and against stock ComfyUI, by mode and by sampler"),
    "bench overhead": ("comfy_xdit_bench.overhead", "one rank through the pool against the same model in-process"),
    "bench scaling": ("comfy_xdit_bench.scaling", "each parallel method against one thread and N threads"),
    "bench memory": ("comfy_xdit_bench.memory", "bytes of weights per rank and per machine"),
    "bench vae": ("comfy_xdit_bench.vae", "a rank's peak memory in the parallel VAE"),
    "bench lora": ("comfy_xdit_bench.lora", "switching a LoRA on the pool against ComfyUI's own way"),
    "bench native": ("comfy_xdit_bench.native", "ComfyUI's own classes on one rank and on several, against its own"),
    "bench wire": ("comfy_xdit_bench.wire", "bytes that each method sends, beside the formulas"),
    "bench drift": ("comfy_xdit_bench.drift", "pictures of the approximate methods against exact ones"),
    "bench trace": ("comfy_xdit_bench.trace", "what each rank did when in one job, as a Chrome trace and a picture"),
    "bench links": ("comfy_xdit_bench.links", "the plan's order of methods beside the measured one, link by link"),
    "bench chaos": ("comfy_xdit_bench.chaos", "a random fault in each job, and whether the next one is right"),
    "bench heal": ("comfy_xdit_bench.heal", "kill workers again and again and watch the pool heal"),
}
"""Command words → (module, one line of help)."""

PROGRAM = "comfy-xdit"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error that is told in a sentence, 2 for wrong usage."""
    # `python -m comfy_xdit` and the console command know this package only. The nodes need a ComfyUI about them.
    mount(*sorted(PACKAGES.keys() - {"comfy_xdit_nodes"}))
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return _run(name, words[length:])
    asked_for_help = not words or words[0] in ("-h", "--help", "help")
    stream = sys.stdout if asked_for_help else sys.stderr
    if not asked_for_help:
        stream.write(f"{PROGRAM}: {' '.join(words[:2])!r} is no command\n")
    stream.write(_usage(words[:1]))
    return 0 if asked_for_help else 2


def _run(name: str, rest: list[str]) -> int:
    # Before torch is imported. A worker that was restarted is no news on a command's screen; TensorPipe would
    # warn of each connection that ended with it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=summary)
    module.arguments(parser)
    args = parser.parse_args(rest)
    try:
        return int(module.run(args))
    except (PoolError, ValueError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return 1
    except OSError as error:
        # A file that was named. What has no name was no argument: a fault, whose trace tells more.
        if error.filename is None:
            raise
        sys.stderr.write(f"{PROGRAM}: cannot use {error.filename} ({error.strerror}); give another path\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _usage(words: list[str]) -> str:
    """The commands, only those below the first of `words` when there are any."""
    shown = {name: help for name, (_, help) in COMMANDS.items() if name.split()[0] in words} or {
        name: help for name, (_, help) in COMMANDS.items()
    }
    width = max(len(name) for name in shown)
    lines = [f"  {PROGRAM} {name:<{width}}  {help}" for name, help in shown.items()]
    return "Commands (--help after one shows its arguments):\n" + "\n".join(lines) + "\n"
