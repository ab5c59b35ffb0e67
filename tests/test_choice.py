"""Which degrees a plan and `auto` choose, what fits a device, and what a pool measures of itself."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import tiny
from comfy_xdit_bench.checkpoint import FluxSize
from comfy_xdit_bench.sd3 import SD3Size
from networks import FLUX_DEV, GPU, flux_dev, header_only, network_of
from ranks import Ranks

from comfy_xdit import cli
from comfy_xdit.cost import choose, measured, on_pool
from comfy_xdit.cost.arithmetic import read_network
from comfy_xdit.cost.choose import predict, predictions, ranking
from comfy_xdit.cost.links import Device, Machines, device_named, link_named
from comfy_xdit.cost.memory import memory
from comfy_xdit.cost.work import Work
from comfy_xdit.messages import Probe, Result
from comfy_xdit.parallel.latent_tokens import Grid
from comfy_xdit.parallel.patch_rows import cut_rows
from comfy_xdit.parallel.spec import ParallelSpec, auto
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder


@pytest.fixture(name="flux_dev", scope="module")
def made_flux_dev():
    """Flux.1 dev by its shapes alone."""
    return flux_dev()


def test_a_pipeline_falls_back_to_stages_of_equal_weights(flux_dev, tmp_path, capsys):
    """Two stages of Flux hold 65 and 35 % when they take equal time: half each is what fits a small device."""
    work, link, spec = Work(latent=(128, 128), text_tokens=256), link_named("pcie4"), ParallelSpec(pipe=2)
    equal = [memory(flux_dev, dataclasses.replace(work, balance="memory"), spec, rank).parameters for rank in (0, 1)]
    block = 2 * max(block.params for block in flux_dev.blocks)
    assert abs(equal[0] - equal[1]) <= 2 * block and max(equal) <= flux_dev.params + block

    def found(memory_bytes):
        device = Device(name="small", flops_per_s=100e12, memory_bytes=memory_bytes)
        return next(p for p in predictions(flux_dev, work, 2, link, device) if p.spec == spec)

    roomy, small, tiny_one = found(80e9), found(17e9), found(8e9)
    assert (roomy.balance, small.balance, tiny_one.balance) == ("time", "memory", "time")
    assert roomy.fits and small.fits and not tiny_one.fits
    assert small.memory.parameters < roomy.memory.parameters and small.step_s > roomy.step_s
    path = header_only(tmp_path / "flux.safetensors", FLUX_DEV.shapes())
    words = ["plan", "--model", path, "--devices", "2", "--device", "rtx4090"]
    assert cli.main(words) == 0 and "balance = memory" not in capsys.readouterr().out
    assert cli.main([*words, "--size", "2048x1792"]) == 0
    said = capsys.readouterr().out
    assert "1 of 6 specs fit 21.6 GB (24 GB, of which 2.4 GB are left free) only with stages of equal weights" in said


def test_plan_prints_the_best_first(tmp_path, capsys):
    path = header_only(tmp_path / "flux.safetensors", FLUX_DEV.shapes())
    words = ["plan", "--model", path, "--size", "1024x768", "--devices", "4", "--link", "ethernet-25"]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    steps = [entry["step_s"] for entry in result["specs"]]
    assert steps == sorted(steps) and all(entry["fits"] for entry in result["specs"])
    assert result["why"][0].startswith(result["specs"][0]["spec"])
    assert cli.main(words) == 0
    assert "11.90 billion parameters" in capsys.readouterr().out


def test_plan_keeps_what_sends_much_within_a_machine(tmp_path, capsys):
    path = header_only(tmp_path / "flux.safetensors", FLUX_DEV.shapes())
    words = ["plan", "--model", path, "--chunks", "2", "--json"]
    machines = ["--machines", "2", "--network", "ethernet-10"]
    found = []
    for more in ([], machines):
        assert cli.main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    one, two = ([entry["degrees"] for entry in each["specs"]] for each in found)
    assert found[1]["link"] == "nvlink and ethernet-10"
    within = [math.prod(degrees[axis] for axis in ("distri", "ring", "ulysses", "tensor")) for degrees in two]
    assert max(within) <= 4, "a sequence is cut over the slow network"
    assert one != two


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "big"], "--size 'big' is no size"),
        (["--size", "0x64"], "is no size"),
        (["--devices", "0"], "--devices 0 makes no job"),
        (["--chunks", "3"], "neither 1 nor 2"),
        (["--text-tokens", "-500"], "--text-tokens -500 makes no job; use 1 or more"),
        (["--warmup", "-3"], "--warmup -3 makes no job; use 1 or more"),
        (["--link", "string"], "no known link"),
        (["--machines", "3", "--network", "ethernet-10"], "--machines 3 --network ethernet-10 do not fit 8 devices"),
        (["--machines", "2"], "--machines 2 --network None do not fit 8 devices; use a number of machines"),
    ],
)
def test_plan_refuses_in_a_sentence(tmp_path, capsys, words, sentence):
    path = tiny.write(tmp_path / "m.safetensors", tiny.random_weights(tiny.flux_shapes()))
    assert cli.main(["plan", "--model", path, *words]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_opened_is_a_sentence(tmp_path, capsys, name, reason):
    assert cli.main(["plan", "--model", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err == f"comfy-xdit: cannot use {tmp_path / name} ({reason}); give another path\n"


@pytest.mark.parametrize("size", ["1x1", "48x16", "16x1024"])
def test_a_small_image_has_a_plan_without_pipelines_that_cannot_cut_it(tmp_path, capsys, size):
    infos = header_only(tmp_path / "flux.safetensors", FluxSize(hidden=1024).shapes())
    words = ["plan", "--model", infos, "--size", size, "--text-tokens", "5", "--json", "--all"]
    assert cli.main(words) == 0
    found = [entry["degrees"] for entry in json.loads(capsys.readouterr().out)["specs"]]
    width, height = (-(-int(side) // 16) for side in size.split("x"))
    for degrees in found:
        grid = Grid(rows=height, columns=width, side=2)
        if degrees["pipe"] > 1:
            shards = degrees["ring"] * degrees["ulysses"]
            assert shards <= 5
            cut_rows(grid, num_patches=0, num_stages=degrees["pipe"], num_shards=shards)
    assert any(degrees["pipe"] > 1 for degrees in found) and any(degrees["ulysses"] == 8 for degrees in found)


def test_auto_takes_the_cheapest_exact_spec(flux_dev):
    work = Work(latent=(128, 128), text_tokens=256, chunks=2)
    gpu, crowded = GPU, Device(name="small", flops_per_s=200e12, memory_bytes=20e9)

    def chosen(device, link="pcie4", **requested):
        cost = ranking(flux_dev, work, link_named(link), device)
        return auto(8, requested=requested, shape=flux_dev.shape, num_chunks=2, cost=cost)

    found = predictions(flux_dev, work, 8, link_named("pcie4"), gpu, approximate=False)
    taken = predict(flux_dev, work, chosen(gpu), link_named("pcie4"), gpu)
    assert taken.step_s <= 1.03 * min(p.step_s for p in found) and taken.spec.cfg == 2 and not taken.num_idle
    # Over a slow link whoever sends nothing is faster, also with idle ranks: the plan says it, auto uses all.
    slow = link_named("ethernet-10")
    exact = predictions(flux_dev, work, 8, slow, gpu, approximate=False)
    assert exact[0].spec == ParallelSpec(cfg=2, dp=4)
    assert chosen(gpu, "ethernet-10") == ParallelSpec(cfg=2, ulysses=4)
    assert chosen(gpu, cfg=1).cfg == 1
    assert chosen(gpu, ring=2).ring == 2
    spread = chosen(crowded)
    assert spread.tensor > 1 and spread.pipe == spread.distri == 1
    with pytest.raises(ValueError, match="do not divide the pool's 8"):
        chosen(gpu, ulysses=5)


def test_the_next_run_with_the_same_work_computes_nothing(tmp_path, monkeypatch):
    class Pool:
        name, num_ranks = "fast", 8

    path = header_only(tmp_path / "flux.safetensors", FluxSize(hidden=1024).shapes())
    shape = read_network(path).shape
    read, computed = [], []
    measurement = [link_named("pcie4"), GPU]
    monkeypatch.setattr(on_pool, "measure", lambda pool: measurement)
    monkeypatch.setattr(on_pool, "read_network", lambda path: read.append(path) or read_network(path))
    monkeypatch.setattr(choose, "predict", lambda *given: computed.append(given) or predict(*given))

    def chosen(**changed):
        work = {"latent": (128, 128), "images": 1, "chunks": 1, "element_bytes": 2, "param_bytes": 2.0} | changed
        cost = on_pool.cost_on(Pool(), path, **work)
        before = len(computed)
        return auto(8, requested={}, shape=shape, cost=cost), len(computed) - before

    first, num_computed = chosen()
    assert num_computed > 5 and chosen() == (first, 0) and len(read) == 1
    assert chosen(latent=(96, 128))[1] == num_computed == chosen(images=2)[1]
    # Other rates are another link, also of the same name.
    measurement[0] = dataclasses.replace(measurement[0], rates={"all_to_all": 1e9})
    assert chosen()[1] == num_computed and len(read) == 1
    # Other weights and other memory too; but not each megabyte that comes and goes.
    assert chosen(param_bytes=1.0)[1] == num_computed and len(read) == 1
    assert chosen(room_bytes=20 * 2**30)[1] == num_computed
    assert chosen(room_bytes=20 * 2**30 + 2**20)[1] == 0
    header_only(tmp_path / "other.safetensors", FluxSize(hidden=1024, single_blocks=12).shapes())
    (tmp_path / "other.safetensors").replace(path)
    assert chosen()[1] > 0 and len(read) == 2


def test_what_counts_is_what_the_workers_keep_where_there_is_room(tmp_path, monkeypatch):
    """Not the file, and not the whole card: 24 GB, of which ComfyUI may have some."""

    class Pool:
        name, num_ranks = "two cards", 2

    size = FluxSize(hidden=3072, double_blocks=19, single_blocks=38)
    path = header_only(tmp_path / "flux.safetensors", size.shapes())
    shape = read_network(path).shape
    monkeypatch.setattr(on_pool, "measure", lambda pool: (link_named("pcie4"), device_named("rtx4090")))

    def tensor(**kept):
        cost = on_pool.cost_on(Pool(), path, latent=(64, 64), images=1, chunks=1, element_bytes=2, **kept)
        return auto(2, requested={}, shape=shape, cost=cost).tensor

    assert tensor(param_bytes=2.0) == 2, "24 GB of bf16 don't fit a card of 24 GB"
    assert tensor(param_bytes=1.0) == 1, "12 GB of fp8 do"
    assert tensor(param_bytes=1.95) == 2, "with a usual LoRA they are 23 GB"
    assert tensor(param_bytes=1.0, room_bytes=22 * 10**9) == 1
    assert tensor(param_bytes=1.0, room_bytes=14 * 10**9) == 2, "ComfyUI has a text encoder there"


def test_the_docs_examples_are_what_is_chosen(flux_dev):
    size = SD3Size(heads=38, blocks=38, num_dual=0, context_dim=4096, pooled_dim=2048, side=192)
    sd35 = network_of("sd3", size.shapes())
    assert 8.0e9 < sd35.params < 8.3e9
    page = (Path(__file__).resolve().parents[1] / "docs" / "nodes.md").read_text("utf-8")
    rows = re.findall(r"^\| (Flux\.1|SD3\.5)[^|]*, (\w+), (\w+) \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) >= 6
    for title, device, link, *specs in rows:
        model, chunks = (flux_dev, 1) if title == "Flux.1" else (sd35, 2)
        work = Work(latent=(128, 128), text_tokens=model.text_tokens, chunks=chunks)
        cost = ranking(model, work, link_named(link), device_named(device))
        for num_ranks, spec in zip((2, 4, 8), specs, strict=True):
            assert str(auto(num_ranks, requested={}, shape=model.shape, num_chunks=chunks, cost=cost)) == spec


def test_a_pool_measures_itself_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path))
    asked = []

    class Pool:
        name, devices, network = "probed", ["cpu", "cpu"], None
        processes = (("a", 4711), ("b", 4712))

        def status(self):
            return {"ranks": [{"machine": name, "device": "cpu", "pid": pid} for name, pid in self.processes]}

        def lease(self):
            return contextlib.nullcontext()

        def call(self, message, timeout_s=None):
            asked.append(message)
            rates = {"all_to_all": 2e9, "send": 1e9}
            device = {"flops_per_s": 5e10, "memory_bytes": 8 * 10**9, "devices": ["Card 1", "Card 2", "Card 1"]}
            return Result(value={**device, "bytes_per_s": rates, "latency_s": {"send": 1e-4}})

    def start():
        coordinator.unlink(missing_ok=True)
        coordinator.touch()

    coordinator = pool_folder("probed").socket
    start()

    with pytest.raises(ValueError, match="'probed' has not been measured"):
        measured.read("probed")
    link, device = measured.measure(Pool())
    assert measured.measure(Pool()) == (link, device) == measured.read("probed")
    assert asked == [Probe()]
    assert link.seconds({"all_to_all": 2e9}) == pytest.approx(1.0001) and link.seconds({"send": 0}) == 0
    assert device == Device(name="Card 1 or Card 2", flops_per_s=5e10, memory_bytes=8e9)
    # Another pool of this name may have other cards (CUDA_VISIBLE_DEVICES) behind the same names.
    start()
    measured.measure(Pool())
    assert len(asked) == 2
    # On several machines their own torchruns start the processes.
    Pool.network = object()
    first, other = Pool.processes, (("a", 4711), ("b", 4713))
    for Pool.processes, num_asked in ((first, 3), (first, 3), (other, 4)):
        measured.measure(Pool())
        assert len(asked) == num_asked
    assert len(measured.read("probed")) == 2
    coordinator.unlink()
    with pytest.raises(PoolError, match="pool 'probed' ended meanwhile; queue the workflow again"):
        measured.measure(Pool())


def test_the_rank_with_the_least_memory_says_what_fits():
    with Ranks(2) as ranks:
        found = ranks.run("run_probe", cards=[("Card 1", 48 * 10**9), ("Card 2", 24 * 10**9)])
    for each in found:
        assert each["memory_bytes"] == 24e9 and each["devices"] == ["Card 1", "Card 2"]


@pytest.mark.parametrize(("num_ranks", "num_local"), [(2, None), (2, 1), (4, 2)])
def test_ranks_probe_together(num_ranks, num_local):
    with Ranks(num_ranks) as ranks:
        found = ranks.run("run_probe", num_local=num_local)
    assert all(each == found[0] for each in found) and found[0]["flops_per_s"] > 0
    assert found[0]["devices"] == ["cpu"] * num_ranks
    names = {"all_to_all", "all_gather", "all_reduce", "send"}
    within, across = "bytes_per_s" in found[0], "across" in found[0]
    assert (within, across) == (num_local != 1, num_local is not None)
    for part in ([found[0]] if within else []) + ([found[0]["across"]] if across else []):
        assert part["bytes_per_s"].keys() == names == part["latency_s"].keys()
        assert all(rate > 0 for rate in part["bytes_per_s"].values())
    links = measured.links_of("probed", found[0])
    assert isinstance(links, Machines) == across and links.bytes_per_s < 1e12


def test_what_does_not_fit_comes_last(flux_dev):
    work = Work(latent=(128, 128), text_tokens=256)
    small = Device(name="small", flops_per_s=100e12, memory_bytes=20e9)
    found = predictions(flux_dev, work, 4, link_named("nvlink"), small)
    fitting = [prediction.fits for prediction in found]
    assert True in fitting and False in fitting and fitting == sorted(fitting, reverse=True)


def test_a_device_keeps_a_reserve_free(flux_dev):
    """Flux.1 in bf16 takes 23.950 of 24 GB: with a CUDA context beside it, it does not run."""
    named = {name: device_named(name) for name in ("rtx4090", "h100")}
    assert {name: device.room_bytes for name, device in named.items()} == {"rtx4090": 21.6e9, "h100": 72e9}
    # Of a small one a tenth would not hold the contexts.
    assert dataclasses.replace(GPU, memory_bytes=8e9).room_bytes == 6e9
    assert dataclasses.replace(GPU, memory_bytes=1e9).room_bytes == 0

    work, spec, link = Work(latent=(128, 128), text_tokens=256), ParallelSpec(ulysses=4), link_named("pcie4")
    whole = predict(flux_dev, work, spec, link, named["rtx4090"])
    assert 0.98 * 24e9 < whole.memory.total < 24e9 and not whole.fits
    assert predict(flux_dev, work, spec, link, named["h100"]).fits
    cost = ranking(flux_dev, work, link, named["rtx4090"])
    taken = auto(4, requested={}, shape=flux_dev.shape, cost=cost)
    assert taken.tensor == 2 and predict(flux_dev, work, taken, link, named["rtx4090"]).fits
    # Where nothing fits, the least may still run.
    cost = ranking(flux_dev, work, link, dataclasses.replace(GPU, memory_bytes=4e9))
    assert auto(4, requested={}, shape=flux_dev.shape, cost=cost).tensor == 4
