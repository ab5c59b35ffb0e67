"""What ranks send, measured, against the formulas: equal to the byte, on every rank."""

from collections import Counter

import pytest
import tiny
from ranks import Ranks, tiny_call

from comfy_xdit.cost.arithmetic import read_network
from comfy_xdit.cost.formulas import sent
from comfy_xdit.cost.work import Work
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
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(NUM_RANKS) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=["flux", "sd3"])
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
    work = Work(latent=SIZE, text_tokens=TEXT, images=batch // chunks, chunks=chunks, element_bytes=4)
    network = read_network(path)
    measured = [Counter(report["bytes_sent"]) for report in answers]
    assert measured == [sent(network, work, spec, rank) for rank in range(NUM_RANKS)]
    assert all(counter.total() > 0 for counter in measured)
