"""PixArt in ComfyUI: its layouts, its positions, its published sizes, and what it leaves out of a MODEL."""

import comfy.sd
import comfy.utils
import pytest
import torch
from check_lora import TARGETS, with_lora
from check_models_parity import call, error, ours, resident, theirs
from comfy.ldm.pixart.pixartms import get_2d_sincos_pos_embed_torch
from comfy_xdit_nodes import skeleton
from comfy_xdit_nodes.checkpoint import Checkpoint, open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.patches import encode_patches
from comfy_xdit_nodes.remote import RemoteModel
from comfy_xdit_nodes.source import checkpoint_of

from comfy_xdit.messages import FileStamp, SetPatches
from comfy_xdit.models.pixart import PIXART
from comfy_xdit.models.pixart_positions import positions
from comfy_xdit.weights.header import TensorInfo
from comfy_xdit.weights.slices import slice_map

HIDDEN = 144

EXACT = [
    {"tensor": 2},
    {"pipe": 2, "sampling": "step"},
    {"pipe": 2, "warmup_steps": 1000},
    {"distri": 2, "warmup_steps": 1000},
    {"ulysses": 2, "sampling": "step"},
    {"ring": 2},
    {"cfg": 2},
    {"dp": 2},
]
STALE = [{"pipe": 2}, {"distri": 2}]
PUBLISHED = {"hidden_size": 1152, "num_heads": 16, "depth": 28, "caption_channels": 4096}


def weights_of(alpha, **sizes):
    """Names and shapes as ComfyUI's own class has them."""
    config = tiny.pixart_config(alpha)
    config.unet_config.update(sizes)
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "", device="meta").diffusion_model.state_dict()


@pytest.mark.parametrize("alpha", [False, True])
def test_layouts_are_comfyuis(alpha):
    """Which rows of which weight each of diffusers' weights is: as in ComfyUI's own converter."""
    weights = weights_of(alpha)
    expected = {}
    for name, place in comfy.utils.pixart_to_diffusers({"depth": 3, "hidden_size": HIDDEN}).items():
        source, (_, row, rows) = place if isinstance(place, tuple) else (place, (0, 0, None))
        if source in weights and not name.endswith("y_embedding"):
            expected[name] = (source, row, rows or weights[source].shape[0])
    slices = slice_map(PIXART.table(weights), weights)
    assert {name: piece[:3] for name, (piece,) in slices.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [None, 1, 2, 4])
def test_positions_are_comfyuis_to_the_bit(density, dtype):
    for height, width in ((64, 2), (10, 58), (100, 144), (128, 128), (130, 62), (256, 200)):
        mean = (height + width) // 2
        expected = get_2d_sincos_pos_embed_torch(
            HIDDEN,
            h=height // 2,
            w=width // 2,
            pe_interpolation=density or round(mean / 64, 0),
            base_size=round(mean / 64) * 64 // 2,
            dtype=dtype,
        )
        like = torch.zeros(1, 1, HIDDEN, dtype=dtype)
        assert torch.equal(positions(like, height // 2, width // 2, 2, density), expected)


@pytest.mark.parametrize("layout", ["comfyui", "comfyui with positions", "diffusers"])
@pytest.mark.parametrize("alpha", [False, True])
def test_published_sizes(alpha, layout):
    """From a header alone, in each layout: ComfyUI's skeleton, and the same sizes as ours."""
    weights = weights_of(alpha, **PUBLISHED, model_max_length=120 if alpha else 300)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    config = PIXART.config(weights)
    found = dict(shapes)
    if layout == "diffusers":
        slices = slice_map(PIXART.table(weights), weights)
        found = {
            name: (sum(piece.rows for piece in pieces), *shapes[pieces[0].source][1:])
            for name, pieces in slices.items()
        }
    elif layout == "comfyui with positions":
        found["pos_embed"] = (1, 64 * 64, 1152)
        config = PIXART.config(weights | {"pos_embed": torch.empty(found["pos_embed"], device="meta")})
    infos = {key: TensorInfo(dtype="F16", shape=shape, begin=0, end=0) for key, shape in found.items()}
    none = FileStamp(size=0, mtime_ns=0, inode=0)
    checkpoint = Checkpoint(path="", prefix="", family=PIXART, infos=infos, config=config, stamp=none)
    model = skeleton.build(skeleton.config_from_header(checkpoint), checkpoint.meta, RemoteModel())
    kind = "PixArtAlpha" if alpha else "PixArtSigma"
    assert type(model.model_config).__name__ == kind
    density = 2 if "pos_embed" in found else None
    assert model.diffusion_model.pe_interpolation == config["interpolation_scale"] == density
    made = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    made.pop("y_embedder.y_embedding"), shapes.pop("y_embedder.y_embedding")
    assert made == shapes
    assert PIXART.shape(config).num_heads == model.diffusion_model.num_heads == 16


def test_a_lora_in_diffusers_names(models):
    """As trainers of diffusers write it, for parts of weights that are one in ComfyUI."""
    path = models / "alpha.safetensors"
    names = ("attn1.to_k", "attn2.to_v", "attn2.to_q", "ff.net.0.proj")
    generator = torch.Generator().manual_seed(0)
    file = {}
    for name in names:
        rows = 4 * HIDDEN if "ff" in name else HIDDEN
        layer = f"transformer.transformer_blocks.1.{name}"
        file[f"{layer}.lora_A.weight"] = torch.randn(4, HIDDEN, generator=generator)
        file[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    stock, mine, given = tiny.load(path), resident(path), call("alpha")
    before = ours(mine, given)
    dressed = comfy.sd.load_lora_for_models(stock, None, file, 0.8, 0)[0]
    assert len(dressed.patches) == len(names)
    dressed.patch_model()
    patches = encode_patches(dressed.patches)
    assert mine.set_patches(SetPatches(model=mine.key, patches_id="on", patches=patches)) == len(names)
    after = ours(mine, given)
    assert error(after, theirs(dressed, given)) < 2e-6 and error(after, before) > 0.01


def test_the_size_of_a_forgotten_table_goes_along(models):
    """ComfyUI drops the table of positions but keeps what its size says: so must a copy of its weights."""
    path = models / "pixart.safetensors"
    stock = tiny.load(path)
    checkpoint = checkpoint_of(stock, stock)
    assert checkpoint.path != str(path)
    assert checkpoint.config == open_checkpoint(str(path)).config
    assert checkpoint.config["interpolation_scale"] == stock.model.diffusion_model.pe_interpolation == 2
    given = call("pixart")
    assert torch.equal(ours(resident(checkpoint.path), given), ours(resident(path), given))


def test_the_stock_loaders_model(models, tmp_path, fake):
    """Of the published width, with one block: ComfyUI finds it, and the workers read its own file where it says so."""
    path = tmp_path / "wide.safetensors"
    config = tiny.pixart_config()
    config.unet_config.update(PUBLISHED, depth=1)
    tiny.write(path, config, seed=8, beside={"pos_embed": (1, 64 * 64, 1152)})
    stock = comfy.sd.load_diffusion_model(str(path))
    model = parallelize(stock)
    has_own = getattr(stock, "cached_patcher_init", None) is not None
    assert (model.model.checkpoint.path == str(path.resolve())) == has_own
    text = [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    inputs = {"positive": text, "negative": text, "steps": 1, "latent_image": tiny.latent(kind="pixart")}
    assert torch.equal(tiny.sample(model, **inputs), tiny.sample(stock, **inputs))


@pytest.mark.parametrize(("size", "says"), [((33, 40), "multiples of 16 pixels"), ((32, 32), "too small")])
def test_sizes_that_comfyui_has_no_positions_for(size, says, models):
    path, given = models / "alpha.safetensors", call("alpha")
    given["x"] = torch.zeros(2, 4, *size)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        theirs(tiny.load(path), given)
    with pytest.raises(ValueError, match=says):
        ours(resident(path), given)


def test_a_prompt_in_another_size_than_the_picture(models, fake):
    """Alpha's micro-conditioning, as ComfyUI's node for it writes it into the conditioning."""
    path = models / "alpha.safetensors"
    inputs = {"positive": tiny.conditioning(width=900, height=700)}
    expected = tiny.sample(tiny.load(path), **inputs)
    assert torch.equal(tiny.sample(from_checkpoint(open_checkpoint(str(path))), **inputs), expected)
    assert not torch.equal(tiny.sample(tiny.load(path)), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("kind", ["pixart", "alpha"])
def test_every_method_on_a_pool(kind, lora, models, pools):
    """Two images under guidance, against stock; of the latent's norm, in fp32."""
    path = models / f"{kind}.safetensors"
    inputs = tiny.fitted(kind, {"latent_image": tiny.latent(18, 22, batch=2), "sampler_name": "dpmpp_2m"})
    ours = from_checkpoint(open_checkpoint(str(path)))

    def sampled(model):
        return tiny.sample(with_lora(model, "lora", TARGETS["pixart"], 0.7) if lora else model, **inputs)

    stock = sampled(tiny.load(path))
    distances = {
        str(degrees): ((sampled(parallelize(ours, pools(2, **degrees))) - stock).norm() / stock.norm()).item()
        for degrees in EXACT + STALE
    }
    assert all(distances[str(degrees)] <= 2e-6 for degrees in EXACT), distances
    assert all(1e-4 < distances[str(degrees)] < 0.1 for degrees in STALE), distances
