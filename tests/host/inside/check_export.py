"""Weights of a MODEL that names no file travel through shared memory, and leave nothing behind."""

import gc
import os
import stat
import subprocess
import sys
import weakref

import pytest
import safetensors.torch
import torch
from comfy_xdit_nodes import export as exporting
from comfy_xdit_nodes.native import checkpoint
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import parallelize
from comfy_xdit_nodes.source import checkpoint_of, pristine
from native_models import DIFFUSERS

from comfy_xdit.pool.network import Network
from comfy_xdit.weights.fingerprint import fingerprint

TWO_MACHINES = Network(num_machines=2, interface="eth0", address="10.0.0.1")


@pytest.fixture(autouse=True)
def for_diffusers(monkeypatch):
    """The names in a file for ComfyUI's own class are others: check_native_export.py."""
    monkeypatch.setattr(checkpoint, "OF_DIFFUSERS", DIFFUSERS)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(exporting.export, "__defaults__", (tmp_path,))
    return tmp_path


def test_the_file_is_private_and_goes_with_the_model(models, shared):
    stock = tiny.load(models / "flux.safetensors")
    ours = parallelize(stock)
    checkpoint = ours.model.checkpoint
    status = os.stat(checkpoint.path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(checkpoint.path)).st_mode) == 0o700
    written = safetensors.torch.load_file(checkpoint.path)
    original = safetensors.torch.load_file(models / "flux.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    del stock
    gc.collect()
    assert os.path.exists(checkpoint.path), "our MODEL may outlive the one that it was made from"
    del ours
    gc.collect()
    assert not os.path.exists(checkpoint.path)


def test_a_merged_lora_is_not_exported(models, shared):
    from check_lora import TARGETS, with_lora

    stock = with_lora(tiny.load(models / "flux.safetensors"), "lora", TARGETS["flux"], 1.0)
    stock.patch_model(torch.device("cpu"))
    written = safetensors.torch.load_file(checkpoint_of(stock, stock).path)
    original = safetensors.torch.load_file(models / "flux.safetensors")
    assert all(torch.equal(written[key], original[key]) for key in original)


def test_no_room(models, shared, monkeypatch):
    monkeypatch.setattr(exporting, "MARGIN_BYTES", 2**60)
    stock = tiny.load(models / "sd3.safetensors")
    needed = sum(weight.numel() * weight.element_size() for weight in pristine(stock).values())
    with pytest.raises(ValueError, match=rf"takes {needed} bytes .* has \d+ free; load it with") as told:
        parallelize(stock)
    assert str(shared) not in str(told.value)
    assert not list(shared.rglob("*.safetensors"))


def test_a_folder_that_others_can_enter(models, shared):
    (shared / f"comfy-xdit-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="not a private folder"):
        parallelize(tiny.load(models / "sd3.safetensors"))


def test_leftovers_of_killed_processes_go(models, shared):
    folder = shared / f"comfy-xdit-{os.getuid()}"
    folder.mkdir(mode=0o700)
    leftover = folder / "0.safetensors"
    leftover.write_bytes(b"")
    parallelize(tiny.load(models / "sd3.safetensors"))
    assert not leftover.exists()


def test_a_copy_in_use_is_no_leftover(shared):
    """Also to a process that does not see its owner's, as in another container."""
    owner = torch.nn.Module()
    path = exporting.export_file(owner, {"a": torch.ones(3)}, what="MODEL", way_out="-", root=shared)
    code = "import sys, fcntl; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr
    exporting._remove_leftovers(path.parent)
    assert path.exists()


def test_a_forked_child_that_ends_leaves_its_parents_copy(shared):
    owner = torch.nn.Module()
    path = exporting.export_file(owner, {"a": torch.ones(3)}, what="MODEL", way_out="-", root=shared)
    pid = os.fork()
    if not pid:
        weakref.finalize._exitfunc()  # As sys.exit does.
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert path.exists()
    exporting._remove_leftovers(path.parent)
    assert path.exists(), "the child let go of the lock"
    del owner
    assert not path.exists()


def test_the_models_own_file_when_it_says_so(models, shared):
    import comfy.sd

    path = models / "sd3.safetensors"
    stock = comfy.sd.load_diffusion_model(str(path))
    own = getattr(stock, "cached_patcher_init", None) is not None
    checkpoint = checkpoint_of(stock, stock)
    assert (checkpoint.path == os.path.realpath(path)) == own
    changed = comfy.sd.load_diffusion_model(str(path))
    with torch.no_grad():
        min(changed.model.diffusion_model.parameters(), key=torch.numel).add_(1.0)
    assert checkpoint_of(changed, changed).path.startswith(str(shared)), "the file is not what is in the model"


@pytest.mark.parametrize("kind", ["flux", "sd35", "pixart"])
def test_a_file_that_comfyui_saved_is_the_models_own(kind, models, shared):
    import comfy.sd

    path = models / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), tiny.load(models / f"{kind}.safetensors"))
    assert checkpoint_of(tiny.from_file(tiny.load(path), path), path).path == os.path.realpath(path)
    path.unlink()


@pytest.mark.parametrize("spelling", ["scale", "weight"])
def test_a_norms_weight_has_two_spellings(spelling, models, shared):
    path = models / "respelled.safetensors"
    weights = safetensors.torch.load_file(models / "flux.safetensors")
    norms = [key for key in weights if key.endswith(("_norm.scale", "_norm.weight"))]
    for key in norms:
        weights[f"{key.rpartition('.')[0]}.{spelling}"] = weights.pop(key)
    assert norms
    safetensors.torch.save_file(weights, path)
    own = checkpoint_of(tiny.from_file(tiny.load(models / "flux.safetensors"), path), path)
    assert own.path == os.path.realpath(path)
    weights[f"{norms[0].rpartition('.')[0]}.{spelling}"] += 1
    safetensors.torch.save_file(weights, path)
    copied = checkpoint_of(tiny.from_file(tiny.load(models / "flux.safetensors"), path), torch.nn.Module())
    assert copied.path.startswith(str(shared)), "its numbers are others"
    path.unlink()


def test_a_copy_cannot_go_to_other_machines(models, shared, fake):
    fake.network = TWO_MACHINES
    ours = parallelize(tiny.load(models / "sd3.safetensors"))
    with pytest.raises(ValueError, match=r"pool 'fake' is on 2 machines, and this MODEL has no file .* load it with"):
        tiny.sample(ours)
    assert not fake.log, "a worker was touched"
    fake.network = None
    tiny.sample(ours)


def test_other_machines_are_told_which_file_it_must_be(models, fake):
    from comfy_xdit_nodes.checkpoint import open_checkpoint
    from comfy_xdit_nodes.patcher import from_checkpoint

    loads = []
    keep, fake.on_LoadModel = fake.on_LoadModel, lambda message: loads.append(message) or keep(message)
    for fake.network in (None, TWO_MACHINES):
        tiny.sample(from_checkpoint(open_checkpoint(str(models / "sd3.safetensors"))))
    assert [load.fingerprint for load in loads] == ["", fingerprint(str(models / "sd3.safetensors"))]


class Quantised(torch.Tensor):
    """As a format that a node pack brings along."""


@pytest.mark.parametrize(("known", "name"), [("int8_convrot", "int8_convrot"), (None, "Quantised")])
def test_a_loaded_models_format_is_named(known, name, models, shared):
    stock = tiny.load(models / "flux.safetensors")
    for block in stock.model.diffusion_model.single_blocks:
        weight = block.linear1.weight
        block.linear1.weight = torch.nn.Parameter(weight.detach().as_subclass(Quantised), requires_grad=False)
        block.linear1.quant_format = known
    sentence = rf"its single_blocks\.0\.linear1\.weight is in {name}; load it with"
    if use_comfy() is None:
        sentence = rf"this MODEL has single_blocks\.0\.linear1 and 1 other layer in {name}; use fp32"
    with pytest.raises(ValueError, match=sentence):
        parallelize(stock)
