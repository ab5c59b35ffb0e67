"""After every kind of failure the next job on the same pool is right, whatever the method. And bad input ends in a
sentence before any rank computes: the workers stay."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import tiny
import torch
from breakable import Break
from comfy_xdit_worker.service import Service
from harness import private_pool, worker_pids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import flow_program
from test_sample import job

from comfy_xdit.messages import Cancel, Denoise, Held, LoadModel, Patch, Peek, SetPatches
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import PoolError
from comfy_xdit.weights.stamp import stamp

METHODS = ["dp", "cfg", "ulysses", "ring", "distri", "pipe", "tensor"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "flux.safetensors")
    tiny.write(Path(path), tiny.random_weights(tiny.flux_shapes()))
    return LoadModel(
        model="m",
        path=path,
        prefix="",
        family="flux",
        storage_dtype="float32",
        compute_dtype="float32",
        stamp=stamp(path),
    )


@pytest.fixture(scope="module")
def pool(load):
    with private_pool(service="breakable:Breakable") as pool:
        yield pool


def run(method, steps=3):
    """A job that is exact whatever the method."""
    message = job("run", flow_program(steps=steps, cfg=2.5), degrees={method: 2})
    return dataclasses.replace(message, stale=False)


@pytest.fixture(scope="module")
def expected(load):
    """What one rank, in this process, makes of the job."""
    alone = Service(rank=0, world_size=1, device=torch.device("cpu"))
    alone.handle(load)
    return alone.handle(dataclasses.replace(run("dp"), spec=ParallelSpec())).value


def bring(pool, load, method):
    pool.call(dataclasses.replace(load, spec=ParallelSpec(**{method: 2})))


def assert_next_is_right(pool, load, method, expected):
    with pool.lease():
        bring(pool, load, method)
        samples = pool.call(run(method)).value
    assert (samples - expected).abs().max() <= 1e-4 * expected.abs().max()


def fail(pool, load, method, error, ranks, **options):
    with pool.lease():
        bring(pool, load, method)
        pool.call(Break(error=error, ranks=ranks))
        with pytest.raises(PoolError) as told:
            pool.call(run(method), **options)
    return told.value


@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_a_library_on_all_ranks_in_mid_job(pool, load, expected, method):
    """It counted as bad input, and left receives posted on the groups that the next job used."""
    assert_next_is_right(pool, load, method, expected)
    pids = worker_pids(pool)
    error = fail(pool, load, method, "library", [0, 1])
    assert error.kind == "fault" and "ValueError: a library does not like it" in str(error)
    assert "breakable.py" in error.trace
    assert_next_is_right(pool, load, method, expected)
    assert not set(worker_pids(pool)) & set(pids)


@pytest.mark.parametrize("method", ["ulysses", "pipe"])
@pytest.mark.parametrize(("error", "kind"), [("bug", "fault"), ("memory", "memory")])
def test_an_error_on_one_rank(pool, load, expected, method, error, kind):
    assert fail(pool, load, method, error, [1]).kind == kind
    assert_next_is_right(pool, load, method, expected)


@pytest.mark.parametrize("method", ["distri", "pipe"])
def test_a_rank_that_hangs_until_the_clients_limit(pool, load, expected, method):
    assert "within 3 s" in str(fail(pool, load, method, "hang", [1], timeout_s=3.0))
    assert_next_is_right(pool, load, method, expected)


@pytest.mark.parametrize("method", ["ring", "pipe"])
def test_a_lost_worker_and_a_cancelled_run(pool, load, expected, method):
    long = dataclasses.replace(run(method, steps=2000), job="long")
    pids, seen = worker_pids(pool), []

    def cancel():
        answer = pool.aside(Peek(job="long"))
        if answer is not None and answer.value:
            pool.aside(Cancel(job="long"))

    with pool.lease():
        bring(pool, load, method)
        assert pool.call(long, poll=cancel).value is None
    assert_next_is_right(pool, load, method, expected)
    assert worker_pids(pool) == pids

    def kill():
        answer = pool.aside(Peek(job="lost"))
        if answer is not None and answer.value and not seen:
            seen.append(True)
            os.kill(pids[1], signal.SIGKILL)

    with pool.lease():
        bring(pool, load, method)
        with pytest.raises(PoolError) as told:
            pool.call(dataclasses.replace(long, job="lost"), poll=kill)
    assert told.value.kind == "lost"
    assert_next_is_right(pool, load, method, expected)


def test_out_of_memory_brings_back_the_model_in_use_alone(pool, load, expected):
    with pool.lease():
        bring(pool, dataclasses.replace(load, model="other"), "ulysses")
        bring(pool, load, "ulysses")
    assert fail(pool, load, "ulysses", "memory", [1]).kind == "memory"
    with pool.lease():
        assert len(pool.status()["residents"]) == 1 and '"model": "m"' in pool.status()["residents"][0]
    assert_next_is_right(pool, load, "ulysses", expected)


# Bad input


def call(**changes):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 4, 8, 8), "timestep": (1,), "context": (1, 5, 24), "y": (1, 20), "guidance": (1,)}
    made = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value for name, value in {**made, **changes}.items() if value is not ...}


def denoise(*, calls=None, **fields):
    spec = fields.pop("spec", ParallelSpec(ulysses=2))
    given = {"model": "m", "patches_id": "", "chunks": [1], **fields}
    return Denoise(spec=spec, calls=[call()] if calls is None else calls, **given)


def patch(**fields):
    lora = [torch.rand(32, 2), torch.rand(2, 16), 1.0, None, None, None]
    sound = {"key": "img_in.weight", "kind": "lora", "weights": lora, "strength": 1.0, **fields}
    return SetPatches(model="m", patches_id="p", patches=[Patch(**sound)])


def sample(**fields):
    return dataclasses.replace(run("ulysses"), **fields)


BAD = {
    "no calls": denoise(calls=[], chunks=[]),
    "no chunks": denoise(chunks=[]),
    "chunks of 0": denoise(chunks=[0]),
    "chunks that are text": denoise(chunks=["1"]),
    "no context": denoise(calls=[call(context=...)]),
    "no latent": denoise(calls=[call(x=...)]),
    "whole numbers": denoise(calls=[call(x=torch.ones(1, 4, 8, 8, dtype=torch.int64))]),
    "half precision": denoise(calls=[call(context=torch.rand(1, 5, 24).half())]),
    "complex timestep": denoise(calls=[call(timestep=torch.ones(1, dtype=torch.complex64))]),
    "text for a tensor": denoise(calls=[call(context="a cat")]),
    "a video": denoise(calls=[call(x=torch.rand(1, 4, 2, 8, 8))]),
    "an empty latent": denoise(calls=[call(x=torch.rand(1, 4, 0, 8))]),
    "other rows": denoise(calls=[call(context=torch.rand(3, 5, 24))]),
    "other channels": denoise(calls=[call(x=torch.rand(1, 5, 8, 8))]),
    "nothing held": denoise(calls=[call(context=Held(name="nothing"))]),
    "other degrees": denoise(spec=ParallelSpec(ulysses=3)),
    "another model": denoise(model="n"),
    "other patches": denoise(patches_id="q"),
    "no program": sample(program=None),
    "too few conditionings": sample(conds=[]),
    "a latent of another size": sample(latent=torch.rand(1, 4, 8, 8)),
    "noise that is missing": dataclasses.replace(
        job("noisy", flow_program(steps=2, noisy=True), degrees={"ulysses": 2}), noises=[]
    ),
    "fewer than no patches": sample(num_patches=-1),
    "steps that are text": sample(warmup_steps="1"),
    "a strength that is none": patch(strength=float("nan")),
    "a LoRA of rank 0": patch(weights=[torch.rand(32, 0), torch.rand(0, 16), 1.0, None, None, None]),
    "a LoRA of nothing": patch(weights=[]),
    "rows before the first": patch(offset=[0, -4, 4]),
    "a weight that is not there": patch(key="nowhere.weight"),
}


@pytest.fixture
def steady(pool, load, expected):
    """A pool with the model, whose workers and group must be the same ones at the end, and right."""
    with pool.lease():
        bring(pool, load, "ulysses")
        pool.call(SetPatches(model="m", patches_id="", patches=[]))
        pids, generation = worker_pids(pool), pool.generation
        yield pool
    assert_next_is_right(pool, load, "ulysses", expected)
    assert worker_pids(pool) == pids and pool.generation == generation


@pytest.mark.parametrize("message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_sentence_and_the_workers_stay(steady, message):
    with pytest.raises(PoolError) as told:
        steady.call(message)
    assert told.value.kind == "input", str(told.value)
    assert "\n" not in str(told.value)


def test_a_path_that_is_no_file(steady, load, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in ("pipe.safetensors", "", "nowhere.safetensors", "a\0b"):
        with pytest.raises(PoolError) as told:
            steady.call(dataclasses.replace(load, model="n", path=str(tmp_path / path), stamp=None), timeout_s=20)
        assert told.value.kind == "input", path


tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
)
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | tensors


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["x", "timestep", "context", "y", "guidance", "attention_mask", "ref_latents"]), value=values
)
def test_whatever_comes_in_a_call_is_taken_or_refused(steady, name, value):
    try:
        answer = steady.call(denoise(calls=[call(**{name: value})])).value
    except PoolError as error:
        assert error.kind == "input", str(error)
    else:
        assert answer[0].shape[1:] == (4, 8, 8) or name == "x"


def test_a_file_written_in_place_is_refused_until_the_client_knows(pool, load, tmp_path, expected):
    """It gave the numbers of neither model: weights are views of the file, patched ones are not."""
    path = tmp_path / "model.safetensors"
    old, new = (tiny.random_weights(tiny.flux_shapes(), seed=seed) for seed in (0, 1))
    tiny.write(path, old)
    own = dataclasses.replace(load, model="own", path=str(path), stamp=stamp(str(path)))
    message = dataclasses.replace(run("ulysses"), model="own")
    with pool.lease():
        bring(pool, own, "ulysses")
        assert (pool.call(message).value - expected).abs().max() <= 1e-4 * expected.abs().max()
        tiny.write(tmp_path / "new", new)
        with open(path, "r+b") as file:
            file.write((tmp_path / "new").read_bytes())
        for refused in (message, dataclasses.replace(own, spec=ParallelSpec(ulysses=2))):
            with pytest.raises(PoolError, match=r"model\.safetensors was changed after it was loaded") as told:
                pool.call(refused)
            assert told.value.kind == "input"
        bring(pool, dataclasses.replace(own, stamp=stamp(str(path))), "ulysses")
        changed = pool.call(message).value
    alone = Service(rank=0, world_size=1, device=torch.device("cpu"))
    alone.handle(dataclasses.replace(own, path=str(tmp_path / "new"), stamp=None))
    wanted = alone.handle(dataclasses.replace(message, spec=ParallelSpec())).value
    assert (changed - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_file_cut_off_in_mid_job_costs_the_workers_and_says_so(pool, load, expected, tmp_path):
    """The kernel ends who touches a page that is gone."""
    path = tmp_path / "model.safetensors"
    tiny.write(path, tiny.random_weights(tiny.flux_shapes()))
    own = dataclasses.replace(load, model="own", path=str(path), stamp=stamp(str(path)))
    message = dataclasses.replace(run("ulysses", steps=2000), model="own", job="cut")
    cut = threading.Event()

    def poll():
        answer = None if cut.is_set() else pool.aside(Peek(job="cut"))
        if answer is not None and answer.value:
            os.truncate(path, 4096)
            cut.set()

    with pool.lease():
        bring(pool, own, "ulysses")
        with pytest.raises(PoolError) as told:
            pool.call(message, poll=poll)
        assert told.value.kind == "lost"
    with pytest.raises(PoolError, match=r"model\.safetensors was changed") as told:
        bring(pool, own, "ulysses")
    assert told.value.kind == "input"
    assert_next_is_right(pool, load, "ulysses", expected)
