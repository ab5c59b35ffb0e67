"""One evaluation by ComfyUI's model against one by ours, from the same file: layouts, dtypes, sizes, patches."""

import pytest
import safetensors.torch
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patches import encode_patches

from comfy_xdit.messages import SetPatches
from comfy_xdit.models.resident import load

KINDS = ("sd3", "sd35", "flux", "schnell", "pixart", "alpha")
SIZES = [(kind, size) for kind in KINDS[:4] for size in ((10, 14), (9, 13), (16, 2))] + [
    (kind, size) for kind in KINDS[4:] for size in ((10, 58), (66, 2), (54, 142))
]
"""PixArt's have even sides, and 512 pixels once or twice on average: its positions depend on it."""

NUM_UNPATCHED = {"sd35": 1, "pixart": 5, "alpha": 5}
"""ComfyUI leaves alone the table of positions, or the text of no prompt and the shifts and scales of each block."""


def call(kind="sd3", height=10, width=14, tokens=7, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    time = torch.rand(batch, generator=generator)
    given = tiny.latent(height, width, batch, kind=kind)["samples"]
    return {
        "x": rand(*given.shape),
        "timestep": time,
        "context": rand(batch, tokens, tiny.CONTEXT),
        "y": rand(batch, tiny.POOLED),
        "guidance": 3.0 + time,
    }


def theirs(patcher, given):
    model = patcher.model.diffusion_model
    given = dict(given)
    if "Flux" not in type(model).__name__:
        given["timestep"] = given["timestep"] * 1000
        given.pop("guidance")
    return model(given.pop("x"), given.pop("timestep"), **given)


def ours(resident, given):
    family = resident.family
    given = dict(given, timestep=given["timestep"] * (1 if family.name == "flux" else 1000))
    out = resident.module(**family.inputs(resident.config, given), return_dict=False)[0]
    return family.output(out, given)


def resident(path, storage=torch.float32, compute=torch.float32):
    return load(open_checkpoint(str(path)).load(storage=storage, compute=compute), "cpu")


def error(got, expected):
    assert got.shape == expected.shape and expected.isfinite().all() and expected.std() > 0.1
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_fp32(kind, size, models):
    path, given = models / f"{kind}.safetensors", call(kind, *size)
    assert error(ours(resident(path), given), theirs(tiny.load(path), given)) < 2e-6


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_cast_at_use(kind, storage, models, tmp_path):
    """A narrow file, sums in fp32: every number is the file's own."""
    weights = safetensors.torch.load_file(models / f"{kind}.safetensors")
    path = tmp_path / "narrow.safetensors"
    safetensors.torch.save_file({key: value.to(storage) for key, value in weights.items()}, path)
    given = call(kind)
    expected = theirs(tiny.load(path, storage, torch.float32), given)
    assert error(ours(resident(path, storage), given), expected) < 2e-6


@pytest.mark.parametrize("kind", ["sd3", "flux", "alpha"])
def test_all_in_bf16(kind, models, tmp_path):
    given = call(kind)
    weights = safetensors.torch.load_file(models / f"{kind}.safetensors")
    path = tmp_path / "half.safetensors"
    safetensors.torch.save_file({key: value.bfloat16() for key, value in weights.items()}, path)
    exact = theirs(tiny.load(models / f"{kind}.safetensors"), given)
    half = {key: value if key == "timestep" else value.bfloat16() for key, value in given.items()}
    stock = theirs(tiny.load(path, torch.bfloat16), half)
    got = ours(resident(path, torch.bfloat16, torch.bfloat16), half)
    assert got.dtype == stock.dtype == torch.bfloat16
    # Two ways to sum in bf16 differ as much as either does from the truth.
    assert error(got.float(), exact) < 1.5 * error(stock.float(), exact) + 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pixart"])
def test_diffusers_layout(kind, models, tmp_path):
    """Not of the PixArt whose table of positions says how densely they lie: this layout has none."""
    plain = resident(models / f"{kind}.safetensors")
    path = tmp_path / "own.safetensors"
    state = {key: value.contiguous() for key, value in plain.module.state_dict().items()}
    safetensors.torch.save_file(state, path)
    again, given = resident(path), call(kind)
    assert torch.equal(ours(again, given), ours(plain, given))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd35", "flux", "pixart", "alpha"])
def test_patches_on_every_weight(kind, storage, models, tmp_path):
    """Rounded to the storage dtype as ComfyUI does, and not on buffers; then off again, to the bit."""
    weights = safetensors.torch.load_file(models / f"{kind}.safetensors")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: value.to(storage) for key, value in weights.items()}, path)
    stock, mine = tiny.load(path, storage, torch.float32), resident(path, storage)
    given = call(kind)
    before = ours(mine, given)
    generator = torch.Generator().manual_seed(5)
    patches = {
        key: ("diff", (0.1 * torch.randn(value.shape, generator=generator) * value.float().std(),))
        for key, value in stock.model.state_dict().items()
        if key.startswith("diffusion_model.")
    }
    assert stock.add_patches(patches, 0.8, 0.9)
    stock.patch_model()
    sent = SetPatches(model=mine.key, patches_id="on", patches=encode_patches(stock.patches))
    assert mine.set_patches(sent) == len(patches) - NUM_UNPATCHED.get(kind, 0) == mine.num_patched
    after = ours(mine, given)
    assert error(after, theirs(stock, given)) < 2e-6 and error(after, before) > 0.05
    mine.set_patches(SetPatches(model=mine.key, patches_id="off", patches=[]))
    assert torch.equal(ours(mine, given), before)
