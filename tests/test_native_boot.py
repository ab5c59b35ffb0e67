"""What a worker refuses before it imports anything of a ComfyUI."""

import sys

import pytest
import torch
from comfy_xdit_worker.service import Service

from comfy_xdit.errors import InputError
from comfy_xdit.messages import ComfySource, Denoise, LoadModel, Tuple, UseComfy, decode, encode
from comfy_xdit.native.boot import boot, kitchen_version, sources_of, version_of
from comfy_xdit.parallel.spec import ParallelSpec

CPU = torch.device("cpu")


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "model_detection.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "comfyui_version.py").write_text('# made by hand\n__version__ = "0.33.0"\n')
    return tmp_path


def wanted(folder, **changes):
    told = {"version": "0.33.0", "sources": sources_of(str(folder)), "kitchen": kitchen_version(), "options": {}}
    return UseComfy(folder=str(folder), **(told | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": "0.29.0"}, r"have ComfyUI 0\.33\.0, this ComfyUI 0\.29\.0; restart"),
        ({"kitchen": "9.9"}, r"have comfy-kitchen .*9\.9; restart"),
        ({"sources": "other"}, "with other sources"),
    ],
)
def test_another_comfyui_is_refused(checkout, changes, sentence):
    before = list(sys.path)
    with pytest.raises(InputError, match=sentence) as raised:
        boot(wanted(checkout, **changes), CPU)
    assert str(checkout) not in str(raised.value)
    assert sys.path == before


def test_a_folder_without_comfyui_is_refused(tmp_path):
    with pytest.raises(InputError, match="find no ComfyUI"):
        boot(wanted(tmp_path), CPU)


def test_any_change_of_its_sources_counts(checkout):
    before = sources_of(str(checkout))
    (checkout / "comfy" / "ops.py").write_text("")
    assert sources_of(str(checkout)) != before
    assert version_of(str(checkout)) == "0.33.0"


def test_the_messages_cross():
    source = ComfySource(kind="Flux", config="0", dtype="bfloat16", cast="", fp8=False)
    load = LoadModel(
        model="a", path="b", prefix="", family="Flux", storage_dtype="bfloat16", compute_dtype="bfloat16", source=source
    )
    assert decode(*encode(load)) == load
    call = {"x": [torch.ones(1), torch.ones(2)], "timestep": Tuple(items=[torch.ones(1), torch.ones(3)])}
    sent = Denoise(model="a", patches_id="", spec=ParallelSpec(), calls=[call], chunks=[1])
    (came,) = decode(*encode(sent)).calls
    assert isinstance(came["timestep"], Tuple) and [len(part) for part in came["x"]] == [1, 2]


def test_a_new_worker_is_told_of_comfyui_before_its_models(monkeypatch, checkout):
    booted = []
    monkeypatch.setattr("comfy_xdit.native.boot.boot", lambda message, device: booted.append(message))
    service = Service(rank=0, world_size=1, device=CPU)
    first = wanted(checkout)
    service.handle(first)
    assert service.setup() == [first]
    (checkout / "comfy" / "ops.py").write_text("")
    service.handle(first)
    assert booted == [first]
    with pytest.raises(InputError, match="with other options; restart the pool"):
        service.handle(wanted(checkout, options={"fast": ["autotune"]}))
    assert service.setup() == [first]
