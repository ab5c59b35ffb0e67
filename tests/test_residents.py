"""What a rank holds: who leaves when memory is short, and files that change under it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import tiny
import tiny_vae
import torch
from comfy_xdit_bench.vae_checkpoint import write_vae
from comfy_xdit_worker import service as services
from comfy_xdit_worker.service import Service
from harness import wait_until
from played_pool import played_pool
from programs import flow_program
from test_sample import job

from comfy_xdit import vae
from comfy_xdit.errors import InputError, is_out_of_memory
from comfy_xdit.messages import Denoise, LoadModel, LoadVAE, Sample, VAEDecode, VAEEncode
from comfy_xdit.models import resident
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.vae.resident import ResidentVAE
from comfy_xdit.weights.stamp import stamp

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny.write(folder / "model.safetensors", tiny.random_weights(tiny.flux_shapes()))
    write_vae(folder / "vae.safetensors", tiny_vae.config())
    return folder


@pytest.fixture
def loads(files, tmp_path):
    """A load of each name; "vae" is one of a VAE. Each has a file of its own."""
    names = {"storage_dtype": "float32", "compute_dtype": "float32"}
    found = {}
    for name in (*NAMES, "vae"):
        path = shutil.copy(files / ("vae.safetensors" if name == "vae" else "model.safetensors"), tmp_path / name)
        found[name] = (
            LoadVAE(vae=name, path=str(path), dtype="float32", stamp=stamp(str(path)))
            if name == "vae"
            else LoadModel(model=name, path=str(path), prefix="", family="flux", stamp=stamp(str(path)), **names)
        )
    return found


@pytest.fixture
def rank():
    return Service(rank=0, world_size=1, device=torch.device("cpu"))


class Memory:
    """Memory for `limit` models and VAEs: a load that finds more alive fails as torch does, with its own half done."""

    def __init__(self, monkeypatch, limit):
        self.limit, self._alive = limit, weakref.WeakSet()
        self.num_tries = 0
        for place, name in ((resident, "load"), (vae, "load_vae")):
            monkeypatch.setattr(place, name, self._limited(getattr(place, name)))

    def _limited(self, load):
        def limited(*args, **kwargs):
            self.num_tries += 1
            made = load(*args, **kwargs)
            self._alive.add(made)
            if len(self._alive) > self.limit:
                raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
            return made

        return limited


def held(rank):
    return [message.vae if isinstance(message, LoadVAE) else message.model for message in rank.residents()]


def test_the_least_recently_used_makes_room_for_a_load(rank, loads, monkeypatch):
    memory = Memory(monkeypatch, 2)
    rank.handle(loads["a"])
    rank.handle(loads["b"])
    rank.handle(loads["a"])
    assert held(rank) == ["b", "a"] and memory.num_tries == 2
    rank.handle(loads["c"])
    assert held(rank) == ["a", "c"] and memory.num_tries == 4
    # A job is a use too.
    with pytest.raises(InputError, match="1 numbers of chunks"):
        rank.handle(Denoise(model="a", patches_id="", spec=ParallelSpec(), calls=[], chunks=[1]))
    rank.handle(loads["vae"])
    assert held(rank) == ["a", "vae"]
    rank.handle(loads["b"])
    assert held(rank) == ["vae", "b"]


def test_as_many_leave_as_the_load_needs(rank, loads, monkeypatch):
    memory = Memory(monkeypatch, 3)
    for name in NAMES:
        rank.handle(loads[name])
    memory.limit = 1
    rank.handle(loads["vae"])
    assert held(rank) == ["vae"] and memory.num_tries == 7


def test_a_load_for_which_there_is_never_room_is_out_of_memory(rank, loads, monkeypatch):
    memory = Memory(monkeypatch, 2)
    rank.handle(loads["a"])
    rank.handle(loads["vae"])
    memory.limit = 0
    with pytest.raises(torch.OutOfMemoryError) as told:
        rank.handle(loads["b"])
    assert is_out_of_memory(told.value) and held(rank) == []


def test_nobody_leaves_for_a_load_that_fails_otherwise(rank, loads, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rank.handle(loads["a"])
    monkeypatch.setattr(resident, "load", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        rank.handle(loads["b"])
    assert held(rank) == ["a"]


OWNER = """
import sys
from pathlib import Path

from comfy_xdit.pool.locks import Lock

locks = [Lock(Path(path)) for path in sys.argv[1:]]
assert all(lock.take() for lock in locks)
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def owner_of(*loads):
    """A process that lends the files of `loads`, as ComfyUI does with copies of what it has no file for."""
    command = [sys.executable, "-c", OWNER, *(load.path for load in loads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("is_removed", [False, True])
def test_copies_of_a_process_that_was_killed_are_unloaded_and_nothing_else(rank, loads, is_removed):
    """Their pages are memory that nobody could use again, or free."""
    with owner_of(loads["a"], loads["vae"]) as killed, owner_of(loads["b"]):
        for load in loads.values():
            rank.handle(load)
        rank.forget_abandoned()
        assert held(rank) == ["a", "b", "c", "vae"], "their owners live, and c has none"
        if is_removed:
            # As the next ComfyUI does with what others left, and a cleaner of shared memory perhaps before.
            os.unlink(loads["a"].path)
            os.unlink(loads["b"].path)
            rank.forget_abandoned()
            assert held(rank) == ["a", "b", "c", "vae"]
        killed.kill()
        killed.wait()
        rank.forget_abandoned()
        assert held(rank) == ["b", "c"]
    gc.collect()
    mapped = Path("/proc/self/maps").read_text()
    assert {name for name, load in loads.items() if load.path in mapped} == {"b", "c"}


def test_an_idle_worker_unloads_them_and_says_so(loads, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    rank = Service(rank=0, world_size=1, device=torch.device("cpu"))
    with owner_of(loads["a"]) as killed, played_pool([rank]) as (coordinator, _, pool):
        pool.call(loads["a"])
        pool.call(loads["c"])
        with pool.lease():
            killed.kill()
            killed.wait()
            wait_until(lambda: len(coordinator.residents) == 1, "the end of what was lent")
        assert held(rank) == ["c"]


def touch(message):
    """The file is written to in place."""
    with open(message.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(message.path, ns=(0, 0))  # whatever the grain of the file system's clock


def denoise(load):
    run = job("run", flow_program(steps=2), degrees={})
    calls = [{**run.conds[0], "x": run.noise, "timestep": torch.ones(run.noise.shape[0])}]
    return Denoise(model=load.model, patches_id="", spec=ParallelSpec(), calls=calls, chunks=[1])


def sample(load):
    return dataclasses.replace(job("run", flow_program(steps=2), degrees={}), model=load.model, spec=ParallelSpec())


def decode(load):
    return VAEDecode(vae=load.vae, latent=torch.zeros(1, 4, 8, 8))


def encode(load):
    return VAEEncode(vae=load.vae, image=torch.zeros(1, 3, 32, 32))


JOBS = {
    Denoise: ("a", denoise, services, "denoise"),
    Sample: ("a", sample, services, "sample"),
    VAEDecode: ("vae", decode, ResidentVAE, "decode"),
    VAEEncode: ("vae", encode, ResidentVAE, "encode"),
}


@pytest.mark.parametrize("kind", JOBS)
def test_a_file_that_changes_in_a_job_gives_no_result(rank, loads, monkeypatch, kind):
    """Half of the weights may be the old ones."""
    name, make, place, function = JOBS[kind]
    load = loads[name]
    rank.handle(load)
    assert rank.handle(make(load)).value is not None
    run = getattr(place, function)

    def changes(*args, **kwargs):
        result = run(*args, **kwargs)
        touch(load)
        return result

    monkeypatch.setattr(place, function, changes)
    with pytest.raises(InputError, match=f"the file {name} was changed after it was loaded"):
        rank.handle(make(load))
    monkeypatch.setattr(place, function, run)
    # Not used again either, until it is loaded anew.
    with pytest.raises(InputError, match="was changed after it was loaded"):
        rank.handle(make(load))
    rank.handle(dataclasses.replace(load, stamp=stamp(load.path)))
    assert rank.handle(make(load)).value is not None


@pytest.mark.parametrize("name", ["a", "vae"])
def test_a_file_that_changes_in_its_load_is_not_held(rank, loads, monkeypatch, name):
    place, function = (vae, "load_vae") if name == "vae" else (resident, "load")
    run = getattr(place, function)

    def changes(*args, **kwargs):
        made = run(*args, **kwargs)
        touch(loads[name])
        return made

    monkeypatch.setattr(place, function, changes)
    with pytest.raises(InputError, match="was changed after it was loaded"):
        rank.handle(loads[name])
    assert held(rank) == []
