"""The demo's two loaders: a VAE of any width, and conditioning from a file."""

import shutil

import folder_paths
import pytest
import torch
from comfy_xdit_nodes.conditioning import XDiTLoadConditioning
from comfy_xdit_nodes.load_vae import XDiTLoadVAE

from comfy_xdit import messages as m
from comfy_xdit.demo import assets, words
from comfy_xdit.vae import load_vae


@pytest.fixture
def tiny(monkeypatch):
    """The demo's VAE among the host's models; its name there."""
    paths, suffixes = folder_paths.folder_names_and_paths["vae"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", ([*paths, str(assets.FOLDER)], suffixes))
    return assets.VAE.name


@torch.inference_mode()
def test_a_vae_of_any_width_decodes_and_encodes(tiny):
    (vae,) = XDiTLoadVAE().load_vae(tiny)
    ours = load_vae(m.LoadVAE(vae="x", path=str(assets.VAE), dtype="float32"), "cpu")
    latent = torch.randn(1, assets.CHANNELS, 6, 5)
    image = vae.decode(latent)
    expected = ours.decode(latent).movedim(1, -1)
    torch.testing.assert_close(image, ((expected + 1) / 2).clamp(0, 1), atol=1e-4, rtol=0)
    moments = ours.encode(image.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(vae.encode(image), moments[:, : assets.CHANNELS], atol=1e-3, rtol=1e-4)


def test_conditioning_is_that_of_the_file():
    name = "demo-nodes-check.safetensors"
    file = shutil.copy(assets.CONDITIONING, folder_paths.get_input_directory() + "/" + name)
    node = XDiTLoadConditioning()
    assert name in node.INPUT_TYPES()["required"]["file"][0]
    (((context, extra),),) = node.load(name, words.PROMPTS[0])
    assert torch.equal(context, words.encode(words.PROMPTS[0])[0])
    assert torch.equal(extra["pooled_output"], words.encode(words.PROMPTS[0])[1])
    with pytest.raises(ValueError, match="'a green dog' is not in"):
        node.load(name, "a green dog")
    for outside in ("../" + name, file + ".missing", "/etc/hostname"):
        with pytest.raises(ValueError, match=r"there is no|Invalid file path"):
            node.load(outside, words.PROMPTS[0])
