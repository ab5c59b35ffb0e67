"""A model is held as its load message spreads it; another spread loads it anew, on all ranks alike."""

import dataclasses

import pytest
import test_resident_model as resident
import tiny
import torch
from comfy_xdit_worker.service import Service

from comfy_xdit.messages import Denoise, SetPatches
from comfy_xdit.parallel.spec import ParallelSpec


@pytest.fixture
def message(tmp_path):
    path = tiny.write(tmp_path / "model.safetensors", tiny.random_weights(tiny.flux_shapes()))
    return resident.message(path, "flux")


def spread(message, **degrees):
    return dataclasses.replace(message, spec=ParallelSpec(**degrees))


def blocks(service, message):
    return service.handle(message).value["blocks"]


def service(rank=0, world_size=4):
    return Service(rank=rank, world_size=world_size, device=torch.device("cpu"))


def test_each_rank_loads_its_part(message) -> None:
    wanted = spread(message, cfg=2, pipe=2)
    assert [blocks(service(rank), wanted) for rank in range(4)] == [[0, 2], [2, 4], [0, 2], [2, 4]]


def test_another_spread_loads_anew_on_every_rank(message) -> None:
    """Rank 0 holds the same blocks either way, but must lose its patches with the others."""
    for rank, expected in ((0, [0, 2]), (1, [0, 2]), (2, [2, 4])):
        worker = service(rank)
        worker.handle(spread(message, cfg=2, pipe=2))
        patches = [resident.lora("img_in.weight", torch.Size((32, 16)))]
        worker.handle(SetPatches(model="m", patches_id="p", patches=patches))
        same = worker.handle(spread(message, dp=2, pipe=2)).value
        assert same["patches_id"] == "p"
        assert worker.residents() == [spread(message, dp=2, pipe=2)]
        other = worker.handle(spread(message, pipe=2, ulysses=2)).value
        assert other["patches_id"] == "" and other["blocks"] == expected
    worker.handle(spread(message, ulysses=4))
    assert blocks(worker, spread(message, cfg=2, ring=2)) == [0, 4]


def test_a_job_of_another_spread_is_refused(message) -> None:
    worker = service()
    worker.handle(spread(message, pipe=4))
    job = Denoise(model="m", patches_id="", spec=ParallelSpec(ulysses=4), calls=[], chunks=[])
    with pytest.raises(ValueError, match="loaded for pipe=4, which spreads its weights otherwise than ulysses=4"):
        worker.handle(job)


def test_what_does_not_fit_is_told_by_every_rank_alike(message) -> None:
    """Also by those that hold nothing of the weight: the client asks one of them."""
    odd = resident.lora("double_blocks.0.img_mlp.0.weight", torch.Size((7, 5)))
    good = resident.lora("img_in.weight", torch.Size((32, 16)))
    for rank in range(2):
        worker = service(rank, 2)
        worker.handle(spread(message, pipe=2))
        answer = worker.handle(SetPatches(model="m", patches_id="p", patches=[odd, good])).value
        assert answer["changed"] == 1
        assert [key for key, _ in answer["misfits"]] == ["double_blocks.0.img_mlp.0.weight"]
        again = worker.handle(SetPatches(model="m", patches_id="p", patches=[odd, good])).value
        assert again == {"changed": 0, "misfits": answer["misfits"]}
        assert worker.handle(SetPatches(model="m", patches_id="", patches=[])).value["misfits"] == []
