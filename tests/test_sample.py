"""The sampling loop on a pool: equal to the same loop around single evaluations, with progress and cancel."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import tiny
import torch
from harness import private_home, worker_pids
from programs import flow_program

from comfy_xdit import cli
from comfy_xdit.messages import Cancel, Denoise, LoadModel, Peek, Sample, encode
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.client import Pool, PoolError
from comfy_xdit.trajectory import Replay

MODES = [{"dp": 2}, {"cfg": 2}, {"ulysses": 2}, {"ring": 2}]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "flux.safetensors")
    tiny.write(Path(path), tiny.random_weights(tiny.flux_shapes()))
    load = LoadModel(
        model="m", path=path, prefix="", family="flux", storage_dtype="float32", compute_dtype="float32"
    )
    with private_home():
        pool = Pool.connect("sample", "cpu:2")
        try:
            with pool.lease():
                pool.call(load)
                yield pool
        finally:
            pool.close()


def job(name, program, *, degrees, batch=1, text=(7, 7), masked=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    latent = (batch, 4, 9, 6)
    conds = [
        {"context": random(1, text[index], 24), "y": random(1, 20), "guidance": torch.tensor([3.5])}
        for index in range(len(program.conds))
    ]
    return Sample(
        job=name, model="m", patches_id="", spec=ParallelSpec(**degrees), program=program, conds=conds,
        noise=random(*latent), latent=random(*latent), noises=[random(*latent) for _ in program.calls],
        mask=(random(*latent) > 0).float() if masked else None,
    )


def around_single_evaluations(pool, message):
    """The same program, replayed here, with one `Denoise` for each evaluation."""
    replay = Replay(
        message.program, noise=message.noise, latent=message.latent, noises=message.noises, mask=message.mask
    )
    for number, call in enumerate(message.program.calls):
        x = replay.model_input(number)
        calls = [
            {**message.conds[index], "x": x, "timestep": torch.full((x.shape[0],), call.timestep)}
            for index in call.conds
        ]
        spec = ParallelSpec(ulysses=2)
        answer = pool.call(Denoise(model="m", patches_id="", spec=spec, calls=calls, chunks=[1] * len(calls)))
        replay.answer(number, answer.value)
        replay.previews(number)
    return replay.output()


@pytest.mark.parametrize("degrees", MODES, ids=lambda degrees: "-".join(degrees))
@pytest.mark.parametrize(
    "options",
    [{}, {"batch": 3}, {"text": (7, 4)}, {"masked": True}],
    ids=["one", "batch", "texts of different length", "inpaint"],
)
def test_the_loop_on_the_workers_equals_single_evaluations(pool, degrees, options):
    message = job(f"{degrees}{options}", flow_program(steps=3, cfg=2.5, noisy=True), degrees=degrees, **options)
    samples = pool.call(message).value
    expected = around_single_evaluations(pool, message)
    assert (samples - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-6


def test_progress_comes_in_order_and_ends_with_the_last_denoised(pool):
    message = job("progress", flow_program(steps=4), degrees={"ulysses": 2})
    samples = pool.call(message).value
    entries = pool.aside(Peek(job="progress")).value
    assert [(entry["step"], entry["total"]) for entry in entries] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(entries[-1]["denoised"], samples), "at sigma 0 the sampler is where the model points"
    assert pool.aside(Peek(job="progress")).value == []
    assert pool.aside(Peek(job="another")).value == []


def test_cancel_ends_the_job_on_every_rank_and_the_next_one_works(pool):
    message = job("long", flow_program(steps=500), degrees={"ring": 2})
    seen = []

    def poll():
        entries = pool.aside(Peek(job="long")).value
        seen.extend(entry["step"] for entry in entries)
        if seen:
            pool.aside(Cancel(job="long"))

    assert pool.call(message, poll=poll).value is None
    assert seen[-1] < 500
    test_progress_comes_in_order_and_ends_with_the_last_denoised(pool)


def test_a_cancel_may_overtake_its_job(pool):
    pool.aside(Cancel(job="early"))
    assert pool.call(job("early", flow_program(steps=3), degrees={"dp": 2})).value is None


def test_a_job_message_is_not_answered_beside_a_job(pool):
    message = job("beside", flow_program(steps=1), degrees={"dp": 2})
    assert pool.aside(message) is None
    assert pool.call(message).value is not None


def test_a_wrong_shape_is_a_sentence_and_the_workers_stay(pool):
    generation = pool.generation
    message = job("wrong", flow_program(steps=1), degrees={"dp": 2})
    for broken, sentence in (
        ({"noise": torch.zeros(1, 5, 8, 8), "latent": torch.zeros(1, 5, 8, 8)}, "5 channels .* takes 4"),
        ({"conds": [{**message.conds[0], "context": torch.zeros(1, 3, 25)}]}, "25 channels .* takes 24"),
    ):
        with pytest.raises(PoolError, match=sentence):
            pool.call(dataclasses.replace(message, **broken))
    assert pool.call(message).value is not None
    assert pool.generation == generation


def test_status_shows_the_model_in_words(pool, capsys):
    assert pool.call(job("status", flow_program(steps=1), degrees={"dp": 2})).value is not None
    deadline = time.monotonic() + 30
    while "flux m: blocks 0 to 3" not in capsys.readouterr().out:
        assert time.monotonic() < deadline, "the model never showed in the status"
        assert cli.main(["pool", "status", "--name", "sample"]) == 0
        time.sleep(0.1)


CLIENT = """
import runpy, sys
runpy.run_path(sys.argv[1])["mount"]("comfy_xdit", "comfy_xdit_worker")
import torch
from comfy_xdit import messages, trajectory  # noqa: F401: the kinds of messages
from comfy_xdit.pool.client import Pool
text, tensors = torch.load(sys.argv[2])
message = messages.decode(text, tensors)
pool = Pool.connect("sample", "auto", start=False)
def poll():
    answer = pool.aside(messages.Peek(job=message.job))
    if answer is not None and answer.value:
        sys.stdout.write("running\\n")
        sys.stdout.flush()
pool.call(message, poll=poll)
"""


def test_the_job_of_a_killed_client_ends_with_its_step(tmp_path):
    path = str(tmp_path / "flux.safetensors")
    tiny.write(Path(path), tiny.random_weights(tiny.flux_shapes()))
    load = LoadModel(model="m", path=path, prefix="", family="flux", storage_dtype="float32", compute_dtype="float32")
    endless = job("endless", flow_program(steps=5_000), degrees={"ulysses": 2})
    endless = dataclasses.replace(endless, noises=[])
    torch.save(encode(endless), tmp_path / "job")
    mount = Path(__file__).resolve().parent.parent / "comfy_xdit" / "mount.py"
    with private_home():
        pool = Pool.connect("sample", "cpu:2")
        pool.call(load)
        pids = worker_pids(pool)
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(mount), str(tmp_path / "job")], stdout=subprocess.PIPE, text=True
        )
        try:
            assert client.stdout.readline().strip() == "running"
        finally:
            client.kill()
            client.communicate()
        short = job("short", flow_program(steps=2), degrees={"ulysses": 2})
        assert pool.call(short).value is not None
        assert worker_pids(pool) == pids, "the workers went on, nobody had to restart them"
        pool.close()
