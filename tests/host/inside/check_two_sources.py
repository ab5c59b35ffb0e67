"""diffusers' class and ComfyUI's own give one picture: the families that both sources have."""

import logging
import shutil

import comfy.sd
import native_models
import pytest
from comfy_xdit_nodes.native import checkpoint
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.parity import models as make
from comfy_xdit_nodes.parity.measure import run
from comfy_xdit_nodes.patcher import parallelize

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

WIDE = {"num_heads": 16, "hidden_size": 1152, "depth": 2, "caption_channels": 4096, "model_max_length": 300}
"""ComfyUI reads PixArt's depth from a file, and takes the rest as published."""

FILES = {"flux": "flux", "schnell": "flux", "sd3": "sd3", "sd35": "sd3", "pixart": "pixart", "alpha": "pixart"}
"""Tiny model → the kind whose inputs it takes."""

MODES = {"1 rank": (1, {}), "cfg=2": (2, {"cfg": 2}), "ulysses=2": (2, {"ulysses": 2}), "ring=3": (3, {"ring": 3})}

LIMIT = 1e-5
"""Between two sources, relative to the largest number: the order of sums differs, and PixArt's and SD3's tables do."""


def load(folder, name):
    return comfy.sd.load_diffusion_model(str(folder / f"{name}.safetensors"))


@pytest.fixture(scope="module")
def models(models, tmp_path_factory):
    """The tiny models, PixArt's as wide as it is published."""
    folder = tmp_path_factory.mktemp("wide")
    for name, kind in FILES.items():
        if kind != "pixart":
            shutil.copy(models / f"{name}.safetensors", folder)
            continue
        config = make.pixart_config(alpha=name == "alpha")
        config.unet_config.update(WIDE)
        side = 64 * (1 if name == "pixart" else 2)
        make.write(folder / f"{name}.safetensors", config, seed=5, beside={"pos_embed": (1, side * side, 1152)})
    return folder


@pytest.fixture(scope="module")
def stock(models):
    """`stock(name)`: ComfyUI's own latent."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(load(models, name), FILES[name], "euler", "simple")
        return made[name]

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FILES)
def test_both_sources(name, mode, models, stock, pools, monkeypatch):
    if FILES[name] == "pixart":
        monkeypatch.setattr(make, "CONTEXT", WIDE["caption_channels"])
    num_ranks, degrees = MODES[mode]
    latents = {"ComfyUI": stock(name)}
    for source, kinds in (("diffusers", native_models.DIFFUSERS), ("native", ())):
        monkeypatch.setattr(checkpoint, "OF_DIFFUSERS", kinds)
        model = parallelize(load(models, name), pools(num_ranks, **degrees))
        assert bool(model.model.checkpoint.whose) == (source == "native")
        latents[source] = run(model, FILES[name], "euler", "simple")
    size = latents["ComfyUI"].abs().max()
    apart = {
        pair: ((latents[pair[0]] - latents[pair[1]]).abs().max() / size).item()
        for pair in (("diffusers", "native"), ("diffusers", "ComfyUI"), ("native", "ComfyUI"))
    }
    log.info("%s %s: %s", name, mode, ", ".join(f"{a} and {b} {error:.1e}" for (a, b), error in apart.items()))
    assert latents["ComfyUI"].std() > 0 and max(apart.values()) <= LIMIT
    assert num_ranks > 1 or apart["native", "ComfyUI"] == 0
