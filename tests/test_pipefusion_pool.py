"""PipeFusion on a pool: a job with progress, one that is cancelled on its way, single evaluations, a killed stage."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import tiny
import torch
from harness import private_home, worker_pids
from programs import flow_program
from staged import run_loaded, sampling_job

from comfy_xdit.messages import Cancel, Denoise, LoadModel, Peek, Sample, Status
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool, PoolError

SPEC = ParallelSpec(pipe=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "flux.safetensors"
    return tiny.write(path, tiny.random_weights(tiny.flux_shapes(), dtype=torch.float64))


@pytest.fixture(scope="module")
def pool(path):
    with private_home():
        pool = Pool.connect("pipefusion", "cpu:2")
        try:
            with pool.lease():
                pool.call(load(path))
                yield pool
        finally:
            pool.close()


def load(path, **balance):
    names = {"storage_dtype": "float64", "compute_dtype": "float64"}
    return LoadModel(model="m", path=path, prefix="", family="flux", spec=SPEC, **names, **balance)


def job(name, *, steps=4):
    fields = sampling_job({"family": "flux", "dtype": torch.float64}, flow_program(steps=steps), widths=(24, 20))
    return Sample(job=name, model="m", patches_id="", spec=SPEC, num_patches=3, **fields)


def check_job(pool, path) -> None:
    message = job("whole")
    result = pool.call(message)
    names = ("program", "conds", "noise", "latent", "mask", "noises")
    fields = {name: getattr(message, name) for name in names}
    want, _, shown = run_loaded(path, "flux", fields, {}, num_patches=3)
    assert torch.equal(result.value, want)
    entries = pool.aside(Peek(job="whole")).value
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all(torch.equal(entry["denoised"], own["denoised"]) for entry, own in zip(entries, shown, strict=True))


def test_a_job_equals_one_rank_and_tells_of_each_step(pool, path) -> None:
    check_job(pool, path)


def test_stages_of_equal_weights_give_the_same_bits(pool, path) -> None:
    """Double blocks weigh more than single ones and take as long; the other balance loads the model anew."""
    held = {}
    for balance in ("memory", "time"):
        for _ in range(2):  # the second is held already
            pool.call(load(path, balance=balance))
        check_job(pool, path)
        (model,) = zip(*(result.value["models"] for result in pool.call_all(Status())), strict=True)
        held[balance] = [rank["blocks"] for rank in model], [sum(rank["bytes"].values()) for rank in model]
    assert held["time"][0] == [[0, 2], [2, 4]] and held["memory"][0] == [[0, 1], [1, 4]]
    assert max(held["memory"][1]) < max(held["time"][1])
    with pytest.raises(PoolError, match="stages cannot be balanced by 'luck'; use time or memory"):
        pool.call(load(path, balance="luck"))


def test_cancel_on_its_way(pool, path) -> None:
    seen = []

    def poll():
        seen.extend(entry["step"] for entry in pool.aside(Peek(job="long")).value)
        if seen:
            pool.aside(Cancel(job="long"))

    assert pool.call(job("long", steps=500), poll=poll).value is None
    assert 0 < seen[-1] < 500
    check_job(pool, path)


def test_single_evaluations(pool) -> None:
    """Two rows through two stages equal one after the other."""
    message = job("rows")
    call = {**message.conds[0], "x": torch.cat([message.noise, message.latent]), "timestep": torch.tensor([0.7, 0.2])}
    rows = [{**call, "x": call["x"][n : n + 1], "timestep": call["timestep"][n : n + 1]} for n in (0, 1)]
    denoise = Denoise(model="m", patches_id="", spec=SPEC, calls=[call], chunks=[2])
    (both,) = pool.call(denoise).value
    apart = pool.call(dataclasses.replace(denoise, calls=rows, chunks=[1, 1])).value
    assert torch.equal(both, torch.cat(apart)) and not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_killed_on_its_way(pool, path, stage) -> None:
    """The job fails with a sentence; the pool starts the stage anew, with its blocks, and the next job works."""
    pids = worker_pids(pool)
    killed = []

    def poll():
        if not killed and pool.aside(Peek(job="killed")).value:
            killed.append(pids[stage])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(PoolError):
        pool.call(job("killed", steps=2000), poll=poll)
    assert killed
    pool.call(load(path))
    check_job(pool, path)
