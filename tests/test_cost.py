"""The cost model: arithmetic against torch's own count, formulas against the document's, and the order of specs."""

import dataclasses

import pytest
import tiny
import torch
from comfy_xdit_bench.pixart import PixArtSize
from hypothesis import given
from hypothesis import strategies as st
from networks import GPU, flux_dev, network_of
from torch.utils.flop_counter import FlopCounterMode

from comfy_xdit.cost import document
from comfy_xdit.cost.arithmetic import read_network
from comfy_xdit.cost.choose import predict, predictions
from comfy_xdit.cost.formulas import sent
from comfy_xdit.cost.links import Link, Machines, device_named, link_named
from comfy_xdit.cost.memory import memory
from comfy_xdit.cost.work import Work, part_of
from comfy_xdit.messages import LoadModel
from comfy_xdit.models.resident import load
from comfy_xdit.parallel.sequence import shard_sizes
from comfy_xdit.parallel.spec import ParallelSpec

SHAPES = {
    "flux": tiny.flux_shapes(),
    "sd3": tiny.sd3_shapes(),
    "pixart": tiny.pixart_shapes(positions=32),
}


def call(batch, width=14):
    x, context = torch.randn(batch, 4, 10, width), torch.randn(batch, 9, 24)
    numbers = {"timestep": torch.rand(batch), "guidance": torch.rand(batch)}
    return {"x": x, "context": context, "y": torch.randn(batch, 20), **numbers}


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path):
    return request.param, tiny.write(tmp_path / "model.safetensors", tiny.random_weights(SHAPES[request.param]))


@pytest.fixture(name="flux_dev", scope="module")
def made_flux_dev():
    """Flux.1 dev by its shapes alone."""
    return flux_dev()


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
    tiny_flux = network_of("flux", tiny.flux_shapes(heads=12))
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
    tiny_flux = network_of("flux", tiny.flux_shapes(heads=8))
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


@pytest.mark.parametrize(("rows", "stages", "gain"), [(1, 2, 1.0), (2, 2, 4 / 3), (2, 4, 8 / 5), (6, 3, 18 / 8)])
def test_rows_follow_each_other_through_exact_evaluations(rows, stages, gain):
    """R rows on N stages: (R + N - 1) / (R N) of one rank's time, where stages are alike and links are free."""
    pixart = network_of("pixart", PixArtSize(heads=4, blocks=12).shapes())
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
