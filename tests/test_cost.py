"""The cost model: arithmetic against torch's own count, formulas against the document's, and the order of specs."""

import dataclasses
import json
import math
import struct

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch.utils.flop_counter import FlopCounterMode

from comfy_xdit import cli
from comfy_xdit.bench.checkpoint import FluxSize
from comfy_xdit.bench.pixart import PixArtSize
from comfy_xdit.cost import choose, document, measured, on_pool
from comfy_xdit.cost.arithmetic import ANATOMIES, network, read_network
from comfy_xdit.cost.choose import predict, predictions, ranking
from comfy_xdit.cost.formulas import sent
from comfy_xdit.cost.links import Device, Link, Machines, device_named, link_named
from comfy_xdit.cost.memory import memory
from comfy_xdit.cost.work import Work, part_of
from comfy_xdit.messages import LoadModel, Probe, Result
from comfy_xdit.models import FAMILIES
from comfy_xdit.parallel.segments import Grid, cut_rows, segments_of
from comfy_xdit.parallel.sequence import shard_sizes
from comfy_xdit.parallel.spec import ParallelSpec, auto
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.weights.resident import load

SHAPES = {
    "flux": tiny.flux_shapes(),
    "sd3": tiny.sd3_shapes(),
    "pixart": tiny.pixart_shapes(positions=32),
}
GPU = Device(name="gpu", flops_per_s=200e12, memory_bytes=80e9)


def call(batch, width=14):
    x, context = torch.randn(batch, 4, 10, width), torch.randn(batch, 9, 24)
    numbers = {"timestep": torch.rand(batch), "guidance": torch.rand(batch)}
    return {"x": x, "context": context, "y": torch.randn(batch, 20), **numbers}


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path):
    return request.param, tiny.write(tmp_path / "model.safetensors", tiny.random_weights(SHAPES[request.param]))


class Shape:
    def __init__(self, shape):
        self.shape = shape


@pytest.fixture(scope="module")
def flux_dev():
    """Flux.1 dev by its shapes alone."""
    size = FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context_dim=4096, pooled_dim=768)
    infos = {key: Shape(shape) for key, shape in size.shapes().items()}
    config = FAMILIES["flux"].config(infos)
    params = sum(torch.Size(shape).numel() for shape in size.shapes().values())
    return network(ANATOMIES["flux"], infos, config, FAMILIES["flux"].shape(config), 2 * params)


def test_flops_are_torchs(checkpoint):
    family, path = checkpoint
    model = load(
        LoadModel(model="m", path=path, prefix="", family=family, storage_dtype="float32", compute_dtype="float32"),
        torch.device("cpu"),
    )
    width = tiny.picture(family, (10, 14))[1]
    arguments = model.family.inputs(dict(model.module.config), call(2, width))

    def attention(q, k, v, *args, out_val=None, **kwargs):
        # Shapes, as the counter hands them over.
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter, torch.inference_mode():
        model.module(**arguments, return_dict=False)
    assert counter.get_total_flops() == 2 * read_network(path).flops({"image": 5 * width // 2, "text": 9})


def test_a_header_says_what_the_file_holds(checkpoint):
    family, path = checkpoint
    found = read_network(path)
    unused = ("pos_embed", "y_embedder.y_embedding") if family == "pixart" else ()
    params = sum(torch.Size(shape).numel() for key, shape in SHAPES[family].items() if key not in unused)
    assert found.params == params and found.param_bytes == 4
    assert (found.latent_patch, found.latent_outputs) == (2, 4)
    assert found.token_outputs == (32 if family == "pixart" else 16)
    assert found.guided == (family == "flux")
    assert len(found.blocks) == found.shape.num_blocks == {"flux": 4, "sd3": 3, "pixart": 3}[family]


def test_flux_dev_has_the_size_that_is_known(flux_dev):
    assert 11.8e9 < flux_dev.params < 12.0e9
    assert flux_dev.num_attentions == 57


@given(degree=st.sampled_from([2, 3, 4, 6]), shards=st.integers(1, 40), text=st.integers(1, 9), rows=st.integers(1, 3))
def test_the_documents_formulas_hold_but_for_what_a_rank_keeps(degree, shards, text, rows):
    """Even shards: ours is the document's times (N - 1) / N, and the join of the output beside it."""
    infos = {key: Shape(shape) for key, shape in tiny.flux_shapes(heads=12).items()}
    config = FAMILIES["flux"].config(infos)
    tiny_flux = network(ANATOMIES["flux"], infos, config, FAMILIES["flux"].shape(config), 0)
    work = Work(latent=(2, 2 * degree * shards), text_tokens=degree * text, images=rows, element_bytes=2)
    tokens = sum(work.tokens(tiny_flux).values())
    join = {"ulysses": "all_gather", "ring": "all_gather", "distri": "all_gather"}
    for method in join:
        spec = ParallelSpec(**{method: degree})
        ours = sent(tiny_flux, work, spec, degree - 1).total()
        ours -= rows * shards * tiny_flux.token_outputs * 2 * (degree - 1)
        theirs = document.bytes_sent(
            method, tokens=rows * tokens, hidden=tiny_flux.hidden, layers=4, degree=degree, element_bytes=2
        )
        assert ours * degree == theirs * (degree - 1)


def test_a_rank_alone_sends_nothing(flux_dev):
    assert not sent(flux_dev, Work(latent=(128, 128), text_tokens=256), ParallelSpec(), 0)


def test_memory_falls_as_the_table_says(flux_dev):
    work = Work(latent=(128, 128), text_tokens=256)
    alone = memory(flux_dev, work, ParallelSpec(), 0)
    assert alone.parameters == 2 * flux_dev.params and alone.buffers == 0
    sequence = memory(flux_dev, work, ParallelSpec(ulysses=4), 0)
    assert sequence.parameters == alone.parameters
    assert sequence.activations * 4 == alone.activations
    halves = memory(flux_dev, work, ParallelSpec(tensor=4), 0)
    assert alone.parameters / 4 < halves.parameters < alone.parameters / 4 + 2 * 1.1 * flux_dev.outside.params


@given(num_ranks=st.integers(1, 8), images=st.integers(1, 3))
def test_parts_make_the_whole(num_ranks, images):
    infos = {key: Shape(shape) for key, shape in tiny.flux_shapes(heads=8).items()}
    config = FAMILIES["flux"].config(infos)
    tiny_flux = network(ANATOMIES["flux"], infos, config, FAMILIES["flux"].shape(config), 0)
    work = Work(latent=(10, 14), text_tokens=9, images=images, chunks=2)
    for spec in ({"dp": num_ranks}, {"ulysses": num_ranks}, {"ring": num_ranks}):
        parts = [part_of(tiny_flux, work, ParallelSpec(**spec), rank) for rank in range(num_ranks)]
        if "dp" in spec:
            assert [part.rows for part in parts] == shard_sizes(2 * images, num_ranks)
        else:
            assert sum(part.shard_tokens(("image", "text")) for part in parts) == 35 + 9


def test_the_order_follows_the_link(flux_dev):
    """A fast link leaves compute; over a slow one, who sends least is first."""
    work = Work(latent=(128, 128), text_tokens=256, chunks=2)
    fast, slow = (
        predictions(flux_dev, work, 8, Link(name="", bytes_per_s=rate, latency_s=1e-6), GPU, approximate=False)
        for rate in (1e12, 1e9)
    )
    assert {str(p.spec) for p in fast} == {str(p.spec) for p in slow}
    assert slow[0].sent_bytes == min(prediction.sent_bytes for prediction in slow)
    assert slow[0].spec.cfg == 2
    assert slow[0].waiting_s > fast[0].waiting_s
    times = [prediction.step_s for prediction in fast]
    assert times == pytest.approx(sorted(times), abs=1e-6)


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
    size = FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context_dim=4096, pooled_dim=768)
    path = header_only(tmp_path / "flux.safetensors", size.shapes())
    words = ["plan", "--model", path, "--devices", "2", "--device", "rtx4090"]
    assert cli.main(words) == 0 and "balance = memory" not in capsys.readouterr().out
    assert cli.main([*words, "--size", "2048x1792"]) == 0
    said = capsys.readouterr().out
    assert "1 of 6 specs fit 21.6 GB (24 GB, of which 2.4 GB are left free) only with stages of equal weights" in said


@pytest.mark.parametrize(("rows", "stages", "gain"), [(1, 2, 1.0), (2, 2, 4 / 3), (2, 4, 8 / 5), (6, 3, 18 / 8)])
def test_rows_follow_each_other_through_exact_evaluations(rows, stages, gain):
    """R rows on N stages: (R + N - 1) / (R N) of one rank's time, where stages are alike and links are free."""
    infos = {key: Shape(shape) for key, shape in PixArtSize(heads=4, blocks=12).shapes().items()}
    config = FAMILIES["pixart"].config(infos)
    pixart = network(ANATOMIES["pixart"], infos, config, FAMILIES["pixart"].shape(config), 0)
    work = Work(latent=(128, 128), text_tokens=64, images=rows, num_evaluations=4, warmup=4)
    free = Link(name="free", bytes_per_s=1e30, latency_s=0.0)
    one, piped = (predict(pixart, work, spec, free, GPU).step_s for spec in (ParallelSpec(), ParallelSpec(pipe=stages)))
    assert one / piped == pytest.approx(gain, rel=0.01)


def test_approximate_specs_are_marked_and_can_be_left_out(flux_dev):
    work = Work(latent=(128, 128), text_tokens=256)
    link = link_named("pcie4")
    assert not predict(flux_dev, work, ParallelSpec(distri=2), link, GPU).exact
    assert all(p.exact for p in predictions(flux_dev, work, 4, link, GPU, approximate=False))
    assert not all(p.exact for p in predictions(flux_dev, work, 4, link, GPU))


def test_links_and_devices_by_name():
    assert link_named("ethernet-25").bytes_per_s == pytest.approx(25e9 / 8 * 0.92)
    assert link_named("ethernet-0.5").bytes_per_s < link_named("pcie4").bytes_per_s < link_named("nvlink").bytes_per_s
    with pytest.raises(ValueError, match="'token-ring' is no known link; use nvlink"):
        link_named("token-ring")
    with pytest.raises(ValueError, match="no known link"):
        link_named("ethernet-0")
    with pytest.raises(ValueError, match="'abacus' is no known device"):
        device_named("abacus")


def header_only(path, shapes):
    """A file with a true header, and a hole where the weights would be."""
    entries, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return str(path)


def test_plan_prints_the_best_first(tmp_path, capsys):
    size = FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context_dim=4096, pooled_dim=768)
    path = header_only(tmp_path / "flux.safetensors", size.shapes())
    words = ["plan", "--model", path, "--size", "1024x768", "--devices", "4", "--link", "ethernet-25"]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    steps = [entry["step_s"] for entry in result["specs"]]
    assert steps == sorted(steps) and all(entry["fits"] for entry in result["specs"])
    assert result["why"][0].startswith(result["specs"][0]["spec"])
    assert cli.main(words) == 0
    assert "11.90 billion parameters" in capsys.readouterr().out


def test_plan_keeps_what_sends_much_within_a_machine(tmp_path, capsys):
    size = FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context_dim=4096, pooled_dim=768)
    words = ["plan", "--model", header_only(tmp_path / "flux.safetensors", size.shapes()), "--chunks", "2", "--json"]
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


def test_axes_within_a_machine_and_between_machines():
    near, far = (Link(name=name, bytes_per_s=1.0, latency_s=0.0) for name in ("near", "far"))
    links = Machines(name="both", within=near, across=far, num_local=4)
    for degrees, axes, want in (
        ({"cfg": 2, "ulysses": 4}, ("ulysses",), near),
        ({"cfg": 2, "ulysses": 4}, ("cfg", "dp"), far),
        ({"cfg": 2, "ring": 2, "ulysses": 2}, ("distri", "ring", "ulysses"), near),
        ({"ring": 4, "ulysses": 2}, ("ulysses",), near),
        ({"ring": 4, "ulysses": 2}, ("ring",), far),
        ({"ring": 4, "ulysses": 2}, ("distri", "ring", "ulysses"), far),
        ({"pipe": 4, "tensor": 2}, ("pipe",), far),
        # Three ranks, one after the other, are not always on one machine of four.
        ({"dp": 4, "ulysses": 3}, ("ulysses",), far),
    ):
        assert links.on(ParallelSpec(**degrees), *axes) is want, (degrees, axes)
        assert near.on(ParallelSpec(**degrees), *axes) is near


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
    path = tiny.write(tmp_path / "m.safetensors", tiny.random_weights(SHAPES["flux"]))
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
            rows = cut_rows(grid, num_patches=0, num_stages=degrees["pipe"], num_shards=shards)
            segments_of(grid, rows, {"text": 5, "image": width * height}, num_shards=shards)
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
        work = {"latent": (128, 128), "images": 1, "chunks": 1, "element_bytes": 2} | changed
        cost = on_pool.cost_on(Pool(), path, **work)
        before = len(computed)
        return auto(8, requested={}, shape=shape, cost=cost), len(computed) - before

    first, num_computed = chosen()
    assert num_computed > 5 and chosen() == (first, 0) and len(read) == 1
    assert chosen(latent=(96, 128))[1] == num_computed == chosen(images=2)[1]
    # Other rates are another link, also of the same name.
    measurement[0] = dataclasses.replace(measurement[0], rates={"all_to_all": 1e9})
    assert chosen()[1] == num_computed and len(read) == 1
    header_only(tmp_path / "other.safetensors", FluxSize(hidden=1024, single_blocks=12).shapes())
    (tmp_path / "other.safetensors").replace(path)
    assert chosen()[1] > 0 and len(read) == 2


def test_blocks_that_are_alike_cost_what_each_of_them_does(flux_dev):
    """Nineteen and thirty-eight of a kind: as when every block is one of its own."""
    apart = dataclasses.replace(flux_dev)
    vars(apart)["first_alike"] = list(range(57))
    assert flux_dev.kinds(range(57)) == {0: 19, 19: 38} and len(apart.kinds(range(57))) == 57
    work = Work(latent=(90, 122), text_tokens=77, chunks=2)
    for degrees in ({"ring": 2, "ulysses": 4}, {"tensor": 2, "distri": 2, "ulysses": 2}, {"pipe": 4, "cfg": 2}):
        spec, link = ParallelSpec(**degrees), link_named("pcie4")
        one, other = (predict(each, work, spec, link, GPU) for each in (flux_dev, apart))
        assert one.step_s == pytest.approx(other.step_s, rel=1e-12) and one.sent_bytes == other.sent_bytes
        assert one.memory == other.memory


def test_a_pool_measures_itself_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path))
    asked = []

    class Pool:
        name, devices, network = "probed", ["cpu", "cpu"], None
        processes = (("a", 4711), ("b", 4712))

        def status(self):
            return {"ranks": [{"machine": name, "device": "cpu", "pid": pid} for name, pid in self.processes]}

        def call(self, message, timeout_s=None):
            asked.append(message)
            rates = {"all_to_all": 2e9, "send": 1e9}
            device = {"flops_per_s": 5e10, "memory_bytes": 8 * 10**9, "devices": ["Card 1", "Card 2", "Card 1"]}
            return Result(value={**device, "bytes_per_s": rates, "latency_s": {"send": 1e-4}})

    def start():
        door.unlink(missing_ok=True)
        door.touch()

    door = pool_folder("probed").door
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
    door.unlink()
    with pytest.raises(PoolError, match="pool 'probed' has ended; run again"):
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
