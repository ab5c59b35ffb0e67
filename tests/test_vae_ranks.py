"""Decode and encode over 1, 2 and 3 gloo ranks equal diffusers on one process."""

import importlib.util
from pathlib import Path

import pytest
import torch
from comfy_xdit_bench.vae import run_ranks
from comfy_xdit_bench.vae_checkpoint import random_vae, write_vae

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("tiny_vae", HERE / "tiny_vae.py")
assert spec is not None and spec.loader is not None
tiny_vae = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vae)

CONFIG = tiny_vae.config()

# [batch, height, width] of the latent: even, odd, wide, tall, batches, and rows fewer than ranks.
LATENTS = [(1, 8, 8), (1, 7, 9), (2, 5, 6), (1, 3, 17), (3, 11, 2), (1, 2, 5), (1, 1, 4), (1, 32, 32)]
# [batch, H, W] of the image: multiples of the ratio, an odd width, an odd height, one latent row.
IMAGES = [(1, 32, 32), (2, 28, 36), (1, 20, 30), (1, 30, 20), (1, 4, 12), (1, 128, 128)]
IN_16_BIT = (0, 2, len(LATENTS))
LARGE = (len(LATENTS) - 1, len(LATENTS) + len(IMAGES) - 1)


def cases() -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    latents = [torch.randn(b, 4, h, w, generator=draw) for b, h, w in LATENTS]
    images = [torch.rand(b, 3, h, w, generator=draw) * 2 - 1 for b, h, w in IMAGES]
    return [("decode", x) for x in latents] + [("encode", x) for x in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    write_vae(folder / "vae.safetensors", CONFIG)
    again = [(kind, x.bfloat16()) for kind, x in (cases()[at] for at in IN_16_BIT)]
    torch.save(cases() + again, folder / "cases.pt")
    return folder


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    vae = tiny_vae.reference(CONFIG, random_vae(CONFIG))
    with torch.no_grad():
        return [
            vae.decode(x).sample if kind == "decode" else vae.encode(x).latent_dist.parameters for kind, x in cases()
        ]


@pytest.fixture(scope="module", params=[1, 2, 3])
def results(request: pytest.FixtureRequest, folder: Path) -> dict:
    return run_ranks(folder, request.param)


def test_ranks_equal_one_process(results: dict, expected: list[torch.Tensor]) -> None:
    for (kind, x), ours, reference in zip(cases(), results["outputs"], expected, strict=False):
        assert ours.shape == reference.shape
        worst = (ours - reference).abs().max().item()
        assert worst <= 1e-5 * max(1.0, reference.abs().max().item()), (kind, list(x.shape), worst)


def test_only_rank_0_has_the_result(results: dict) -> None:
    for rank, cases_of_rank in enumerate(results["ranks"]):
        assert all(case["has_result"] == (rank == 0) for case in cases_of_rank)


def test_too_few_rows_are_logged(results: dict) -> None:
    assert ("one rank does it" in results["log"]) == (len(results["ranks"]) > 1)


@pytest.mark.parametrize("large", LARGE)
def test_peak_memory_falls_with_ranks(folder: Path, results: dict, large: int) -> None:
    num_ranks = len(results["ranks"])
    if num_ranks == 1:
        return
    alone = torch.load(folder / "results-1.pt")["ranks"][0][large]["peak_bytes"]
    worst = max(rank[large]["peak_bytes"] for rank in results["ranks"])
    # The latent-sized middle is not cut: a little more than 1 / n.
    assert worst < alone * (1 / num_ranks + 0.1), (num_ranks, worst, alone)


def test_16_bit_is_as_near_to_float32_as_on_one_rank(folder: Path, results: dict, expected: list[torch.Tensor]) -> None:
    alone = torch.load(folder / "results-1.pt")["outputs"]
    for at, like in enumerate(IN_16_BIT, start=len(cases())):
        assert results["outputs"][at].dtype is torch.bfloat16
        off = (results["outputs"][at] - expected[like]).abs().mean()
        assert off <= 1.2 * (alone[at] - expected[like]).abs().mean()
