"""What ranks send, measured, against the formulas: equal to the byte, on every rank."""

from collections import Counter

import pytest
import tiny
from comfy_xdit_bench.program import euler
from comfy_xdit_bench.wire import SUBJECTS, wire
from ranks import Ranks, tiny_call

from comfy_xdit.cost.arithmetic import read_network
from comfy_xdit.cost.formulas import sent
from comfy_xdit.cost.job import sent_in_job
from comfy_xdit.cost.memory import kept_keys
from comfy_xdit.cost.work import Work, part_of
from comfy_xdit.parallel.spec import ParallelSpec

NUM_RANKS = 4
SIZE, TEXT = (9, 14), 7
"""35 tokens of a latent that is padded to 10 rows; like the 7 of text, no degree divides them."""

SPECS = [
    {"cfg": 2, "dp": 2},
    {"dp": 4},
    {"ulysses": 4},
    {"ring": 4},
    {"ring": 2, "ulysses": 2},
    {"cfg": 2, "ulysses": 2},
    {"dp": 2, "ring": 2},
    {"distri": 4},
    {"distri": 2, "ulysses": 2},
    {"distri": 2, "ring": 2},
    {"tensor": 2, "ring": 2},
    {"tensor": 2, "ulysses": 2},
]
SHAPES = {
    "flux": tiny.flux_shapes(heads=6, head_dim=16, context=12, vec=10),
    "sd3": tiny.sd3_shapes(heads=6, context=12, vec=10),
    "pixart": tiny.pixart_shapes(heads=6, depth=4, context=12, alpha=True),
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(NUM_RANKS) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("wire") / f"{request.param}.safetensors"
    return request.param, tiny.write(path, tiny.random_weights(SHAPES[request.param]))


@pytest.mark.parametrize("degrees", SPECS, ids=str)
def test_every_rank_sends_what_the_formula_says(ranks, checkpoint, degrees):
    family, path = checkpoint
    spec = ParallelSpec(**degrees)
    batch = 3 if spec.cfg == 1 else 4
    call = tiny_call(family, seed=1, batch=batch, size=SIZE, text=TEXT)
    chunks = spec.cfg
    answers = ranks.run("run_checkpoint", path=path, family=family, call=call, chunks=chunks, degrees=degrees)
    latent = tiny.picture(family, SIZE)
    work = Work(latent=latent, text_tokens=TEXT, images=batch // chunks, chunks=chunks, element_bytes=4)
    network = read_network(path)
    measured = [Counter(report["bytes_sent"]) for report in answers]
    assert measured == [sent(network, work, spec, rank) for rank in range(NUM_RANKS)]
    assert all(counter.total() > 0 for counter in measured)


RUNS = [
    {"pipe": 4},
    {"pipe": 2, "ulysses": 2},
    {"pipe": 2, "ring": 2},
    {"pipe": 2, "cfg": 2},
    {"pipe": 2, "dp": 2},
    {"pipe": 2, "tensor": 2},
    {"distri": 4},
    {"distri": 2, "ulysses": 2},
    {"ring": 4},
]
NUM_STEPS, WARMUP = 4, 2


def run(ranks, checkpoint, degrees):
    """The ranks' reports of a run with two images under guidance, and the work that it is."""
    family, path = checkpoint
    calls = [tiny_call(family, seed=seed, batch=2, size=SIZE, text=TEXT) for seed in (1, 2)]
    noise = calls[0]["x"]
    conds = [{name: value for name, value in call.items() if name not in ("x", "timestep")} for call in calls]
    fields = {
        "program": euler(NUM_STEPS, cfg=2.0),
        "noise": noise,
        "latent": 0 * noise,
        "mask": None,
        "noises": [],
        "conds": conds,
    }
    reports = ranks.run(
        "sample_checkpoint",
        path=path,
        family=family,
        fields=fields,
        degrees=degrees,
        num_patches=3,
        warmup_steps=WARMUP,
    )
    work = Work(
        latent=tiny.picture(family, SIZE),
        text_tokens=TEXT,
        images=2,
        chunks=2,
        element_bytes=4,
        num_evaluations=NUM_STEPS,
        warmup=WARMUP,
        num_patches=3,
    )
    return reports, read_network(path), work


@pytest.mark.parametrize("degrees", RUNS, ids=str)
def test_a_whole_run_sends_what_the_formula_says(ranks, checkpoint, degrees):
    if degrees.get("pipe") == 4 and checkpoint[0] == "sd3":
        pytest.skip("three blocks make no four stages")
    reports, network, work = run(ranks, checkpoint, degrees)
    spec = ParallelSpec(**degrees)
    measured = [Counter(report["bytes_sent"]) for report in reports]
    assert measured == [sent_in_job(network, work, spec, rank) for rank in range(NUM_RANKS)]
    held = [report.get("kv_bytes", report.get("buffer_bytes", 0)) for report in reports]
    parts = [part_of(network, work, spec, rank) for rank in range(NUM_RANKS)]
    assert held == [kept_keys(network, work, part) for part in parts]


def test_the_times_of_every_rank_are_told(ranks, checkpoint):
    reports, _, _ = run(ranks, checkpoint, {"cfg": 2, "ulysses": 2})
    for rank, report in enumerate(reports):
        assert report["ranks"] == reports[0]["ranks"]
        told = report["ranks"][rank]
        assert told["seconds"] == pytest.approx(
            sum(told[f"{part}_seconds"] for part in ("compute", "communication", "idle"))
        )
        assert told["compute_seconds"] > 0 and told["communication_seconds"] > 0 and told["peak_bytes"] > 0
        assert told["idle_seconds"] == report["idle_seconds"] >= 0
        sent = sum(num_bytes for _, _, _, _, num_bytes in report["events"])
        assert sent == sum(report["bytes_sent"].values())
        inside = [(begin, end) for _, _, begin, end, _ in report["events"]]
        assert all(report["began"] <= begin <= end for begin, end in inside)


@pytest.mark.parametrize("family", SUBJECTS)
def test_the_command_measures_each_family(family):
    rows = wire(num_ranks=2, family=family)["rows"]
    assert {row["method"] for row in rows} >= {"pipe=2", "distri=2", "ring=2", "ulysses=2", "tensor=2"}
    assert all(row["every_rank_equal"] and row["measured_bytes"] > 0 for row in rows)
