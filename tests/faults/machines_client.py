"""A client of a pool on several machines, in a process of its own: `machines_client.py ACTION POOL CHECKPOINT …`.

Says on standard output what it found, one JSON object a line.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
runpy.run_path(str(HERE.parent.parent / "comfy_xdit" / "mount.py"))["mount"](
    "comfy_xdit", "comfy_xdit_worker", "comfy_xdit_bench"
)

import torch  # noqa: E402
from comfy_xdit_bench.checkpoint import FluxSize, random_call  # noqa: E402
from comfy_xdit_bench.program import whole_run  # noqa: E402

from comfy_xdit.messages import LoadModel, Peek, Sample  # noqa: E402
from comfy_xdit.models.resident import load  # noqa: E402
from comfy_xdit.parallel.context import ParallelContext  # noqa: E402
from comfy_xdit.parallel.groups import GroupCache  # noqa: E402
from comfy_xdit.parallel.sample import sample  # noqa: E402
from comfy_xdit.parallel.spec import AXES, ParallelSpec  # noqa: E402
from comfy_xdit.pool.client import Pool, PoolError  # noqa: E402
from comfy_xdit.weights.fingerprint import fingerprint  # noqa: E402

SIZE = FluxSize(hidden=96, head_dim=16, double_blocks=2, single_blocks=3)


def say(**found) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def message(path: str, spec: ParallelSpec) -> LoadModel:
    dtypes = {"storage_dtype": "float32", "compute_dtype": "float32"}
    return LoadModel(model=path, path=path, prefix="", family="flux", spec=spec, **dtypes)


def job(path: str, spec: ParallelSpec, *, steps: int = 3) -> Sample:
    """A run of two pictures with cond and uncond, exact whatever the method."""
    call = random_call(SIZE, tokens=35, text_tokens=13, batch=4)
    return whole_run(path, call, spec, num_evaluations=steps, chunks=2, stale=False, num_patches=2)


def alone(path: str) -> torch.Tensor:
    """The same run in this process, on one rank."""
    spec = ParallelSpec()
    run = job(path, spec)
    with ParallelContext(spec, GroupCache(1)) as context, torch.inference_mode():
        samples, _ = sample(
            load(message(path, spec), "cpu"), run, run.conds, context, post=lambda _: None, wish_to_stop=lambda: False
        )
    assert samples is not None
    return samples


def parity(pool: Pool, path: str) -> None:
    """The largest relative difference of each method on two machines from one rank."""
    want = alone(path)
    for axis in AXES:
        spec = ParallelSpec(**{axis: pool.num_ranks})
        with pool.lease():
            pool.call(message(path, spec))
            answers = pool.call_all(job(path, spec))
        sent = [sum(answer.report["bytes_sent"].values()) for answer in answers]
        difference = ((answers[0].value - want).abs().max() / want.abs().max()).item()
        say(spec=str(spec), difference=difference, bytes_sent=sent)


def killed(pool: Pool, path: str) -> None:
    """A long run, the error that ends it, and the run after that."""
    spec = ParallelSpec(ulysses=pool.num_ranks)
    told = []

    def poll() -> None:
        # No answer in time, on a busy machine, is no news.
        answer = None if told else pool.aside(Peek(job="bench"))
        if answer is not None and answer.value:
            told.append(True)
            say(running=True)

    with pool.lease():
        pool.call(message(path, spec))
        try:
            pool.call(job(path, spec, steps=4000), poll=poll)
        except PoolError as error:
            say(kind=error.kind, sentence=str(error))
    with pool.lease():
        pool.call(message(path, spec))
        value = pool.call(job(path, spec)).value
    say(difference=((value - alone(path)).abs().max() / value.abs().max()).item())


def refused(pool: Pool, *paths: str) -> None:
    """What is said of files that the other machine hasn't got."""
    for path in paths:
        load_it = dataclasses.replace(message(path, ParallelSpec()), fingerprint=fingerprint(path))
        try:
            pool.call(load_it)
            say(kind="loaded")
        except PoolError as error:
            say(kind=error.kind, sentence=str(error))


def main(action: str, name: str, *paths: str) -> None:
    pool = Pool.connect(name, start=False)
    try:
        {"parity": parity, "killed": killed, "refused": refused}[action](pool, *paths)
    finally:
        pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
