"""The pool node's `trace`: files in ComfyUI's output folder on what the workers did, and the same image."""

import json
from itertools import pairwise
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.pool import PoolSetting
from PIL import Image

STEPS = 5


@pytest.fixture
def ours(models):
    return from_checkpoint(open_checkpoint(str(models / "sd3.safetensors")))


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", "comfy_xdit")

    def lines():
        found = [record.getMessage() for record in caplog.records if "what the workers did" in record.getMessage()]
        caplog.clear()
        return found

    return lines


def files():
    return sorted(Path(folder_paths.get_output_directory(), "comfy-xdit").glob("*"))


def spans(path, name):
    """(rank, begin, end) of the trace's events so named, in µs."""
    events = json.loads(path.read_text())["traceEvents"]
    return [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"].startswith(name)]


@pytest.mark.parametrize("sampling", ["auto", "step"])
@pytest.mark.parametrize("method", ["ulysses", "pipe"])
def test_files_of_a_run(method, sampling, ours, pools, said):
    setting = {method: 2, "sampling": sampling}
    plain = tiny.sample(parallelize(ours, pools(2, **setting)), steps=STEPS)
    assert not said()
    before = files()
    traced = tiny.sample(parallelize(ours, pools(2, **setting, trace=True)), steps=STEPS)
    assert torch.equal(traced, plain)
    trace, picture = (path for path in files() if path not in before)
    assert said() == [f"what the workers did when: {trace} (for chrome://tracing) and {picture.name}"]
    assert Image.open(picture).format == "PNG"
    found = spans(trace, "step " if sampling == "step" else "evaluation ")
    for rank in (0, 1):
        own = [(begin, end) for tid, begin, end in found if tid == rank]
        assert len(own) == STEPS and own == sorted(own)
        assert all(first[1] <= second[0] + 1 for first, second in pairwise(own))
    assert spans(trace, "all_to_all" if method == "ulysses" else "p2p" if sampling == "auto" else "broadcast")


def test_a_folder_that_cannot_be_written_to_costs_no_image(ours, pools, said, tmp_path, monkeypatch):
    (tmp_path / "comfy-xdit").write_text("a file where the folder would be")
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    setting = {"ulysses": 2, "trace": True}
    out = tiny.sample(parallelize(ours, pools(2, **setting)), steps=STEPS)
    assert torch.equal(out, tiny.sample(parallelize(ours, pools(2, ulysses=2)), steps=STEPS))
    (line,) = said()
    assert line.startswith("what the workers did could not be written: ")


def test_the_balance_goes_with_the_model(ours, fake):
    for balance in ("memory", "time"):
        tiny.sample(parallelize(ours, PoolSetting(balance=balance)), steps=2)
        assert fake.loaded.balance == balance
