"""Real pools against stock: every sampler of the host, every degree, on tiny SD3 and Flux, in fp32."""

import pytest
import torch
from comfy_xdit_nodes.parity.measure import CASES, KINDS, LIMIT, Parity, setting_of

from comfy_xdit.pool.stop import stop


@pytest.fixture(scope="module")
def parity(models):
    # The models too are made as ComfyUI makes them.
    with torch.inference_mode():
        made = Parity(models)
    yield made
    for num_ranks in {num_ranks for num_ranks, _ in CASES.values()}:
        try:
            stop(setting_of(num_ranks).name)
        except ConnectionError:
            continue


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler(kind, case, parity):
    results = list(parity.measure(kind, case))
    assert len(results) > 30
    assert not [result for result in results if not result.error <= LIMIT]
