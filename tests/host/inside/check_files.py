"""A file that is written to or replaced after it was read: nobody samples with the one taken for the other."""

import os
import shutil

import comfy.model_management as mm
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.conditioning import XDiTLoadConditioning
from comfy_xdit_nodes.load_vae import XDiTLoadVAE
from comfy_xdit_nodes.loader import XDiTLoadDiffusionModel
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.samplers import XDiTKSampler

from comfy_xdit.pool.errors import PoolError
from comfy_xdit.weights.stamp import stamp

NAME = "overwritten.safetensors"


@pytest.fixture
def path(models):
    """A file of its own, with the weights of sd3."""
    path = models / NAME
    shutil.copy(models / "sd3.safetensors", path)
    yield path
    path.unlink(missing_ok=True)


def overwrite(path, seed=77):
    """Other weights of the same size, in the same file: the same inode."""
    tiny.write(path.with_suffix(".new"), tiny.sd3_config(), seed=seed)
    data = path.with_suffix(".new").read_bytes()
    path.with_suffix(".new").unlink()
    assert len(data) == path.stat().st_size
    with open(path, "r+b") as file:
        file.write(data)


LOADERS = {
    "XDiTLoadDiffusionModel": (XDiTLoadDiffusionModel, "diffusion_models", {"weight_dtype": "default"}, "unet_name"),
    "XDiTLoadVAE": (XDiTLoadVAE, "vae", {}, "vae_name"),
    "XDiTLoadConditioning": (XDiTLoadConditioning, "conditioning", {"prompt": "a"}, "file"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_comfyui_is_told_that_a_file_is_another_one(loader):
    node, folder, inputs, name = LOADERS[loader]
    place = folder_paths.get_folder_paths(folder)[0]
    os.makedirs(place, exist_ok=True)
    file = os.path.join(place, "changing.safetensors")
    inputs = {**inputs, name: "changing.safetensors"}
    seen = []
    for value in (1.0, 2.0):
        safetensors.torch.save_file({"a": torch.tensor([value])}, file)
        seen += [node.IS_CHANGED(**inputs), node.IS_CHANGED(**inputs)]
    assert seen[0] == seen[1] != seen[2] == seen[3]
    os.remove(file)


def test_real_workers_load_an_overwritten_file_anew(path, pools):
    pool = pools(1)

    def load():
        (model,) = XDiTLoadDiffusionModel().load_unet(NAME, "default")
        return model

    def sample(model):
        return tiny.sample(model, node=XDiTKSampler(), pool=pool)

    def alike(a, b):
        return (a - b).abs().max() <= 1e-4 * b.abs().max()

    first = load()
    before = tiny.sample(tiny.load(path))
    assert alike(sample(first), before)
    overwrite(path)
    after = tiny.sample(tiny.load(path))
    assert not alike(before, after)
    with pytest.raises(PoolError, match=r"overwritten\.safetensors"):
        sample(first)
    second = load()
    assert alike(sample(second), after)
    mm.unload_all_models()
    assert alike(sample(second), after)


def test_a_loaded_models_weights_count_not_what_became_of_its_file(path, fake, caplog):
    stock = tiny.from_file(tiny.load(path), path)
    expected = tiny.sample(stock)
    assert torch.equal(tiny.sample(parallelize(stock)), expected)
    assert fake.loaded.path == os.path.realpath(path)
    overwrite(path)
    assert torch.equal(tiny.sample(parallelize(stock)), expected)
    assert fake.loaded.path != os.path.realpath(path)
    copied = fake.loaded.path
    assert torch.equal(tiny.sample(parallelize(stock)), expected)
    assert fake.loaded.path == copied, "it is copied once"
    assert len(fake.models) == 1, "the first one was unloaded"


def test_stamps_travel_with_the_load(path, fake):
    tiny.sample(from_checkpoint(open_checkpoint(str(path))))
    assert fake.loaded.stamp == stamp(str(path))


def test_a_pipe_is_no_file(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"pipe\.safetensors is not a file"):
        open_checkpoint(str(pipe))
