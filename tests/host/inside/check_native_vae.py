"""VAEs of ComfyUI's own classes on a pool of two ranks: stock's pictures, videos and latents."""

import gc
import importlib.util
import inspect
import logging
import weakref
from pathlib import Path

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import comfy_xdit_nodes.native.vae as native_vae
import comfy_xdit_nodes.vae as vae_nodes
import comfy_xdit_nodes.vae_remote as vae_remote
import folder_paths
import pytest
import torch
from comfy_xdit_bench.vae_checkpoint import random_vae
from comfy_xdit_nodes.load_vae import XDiTLoadVAE
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.vae import XDiTVAEDecode, XDiTVAEDecodeTiled, XDiTVAEEncode, XDiTVAEEncodeTiled
from safetensors.torch import save_file
from vae_classes import CLASSES, file_of

import nodes
from comfy_xdit import messages as m
from comfy_xdit.errors import InputError
from comfy_xdit.native.vae import ComfyVAE
from comfy_xdit.native.vae_hash import vae_hash
from comfy_xdit.pool.errors import PoolError

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI's own classes don't go to workers")

spec = importlib.util.spec_from_file_location("tiny_vae", Path(__file__).resolve().parents[2] / "tiny_vae.py")
tiny_vae = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vae)

TILES = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
KINDS = ("image", "video")


def random_weights(model):
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for key, one in model.state_dict().items():
        drawn = torch.randn(one.shape, generator=draw)
        weights[key] = drawn * 0.7 / max(one[0].numel(), 1) ** 0.5 if one.ndim > 1 else drawn * 0.02
        if key.endswith("gamma"):
            weights[key] = 1 + drawn * 0.02
    return weights


def image_vae(folder):
    """An AutoencoderKL that ComfyUI can't tell from its weights alone: of other widths, and 4 x 4 pixels a number."""
    name = "native-vae.safetensors"
    save_file(random_vae(tiny_vae.config()), str(folder / name))
    return XDiTLoadVAE().load_vae(name)[0]


def video_vae():
    """Wan 2.1's, narrower; it decodes frames in order, with a cache."""
    settings = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0}
    model = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True], **settings)
    return comfy.sd.VAE(sd=random_weights(model), dtype=torch.float32)


@pytest.fixture(scope="module")
def vaes():
    folder = Path(folder_paths.get_folder_paths("vae")[0])
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        yield {"image": image_vae(folder), "video": video_vae()}
    comfy.model_management.unload_all_models()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def setting(pools):
    return pools(2)


@pytest.fixture
def said(caplog):
    with caplog.at_level(logging.INFO, "comfy_xdit"):
        yield caplog


def latent(kind, batch=1):
    shape = {"image": (batch, 4, 24, 20), "video": (batch, 16, 4, 12, 10)}[kind]
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(batch))}


def pixels(kind):
    shape = {"image": (2, 96, 88, 3), "video": (13, 80, 96, 3)}[kind]
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def assert_same(ours, stock):
    assert (ours.shape, ours.dtype, ours.device) == (stock.shape, stock.dtype, stock.device)
    assert stock.std() > 0.01
    assert torch.equal(ours, stock), (ours - stock).abs().max().item()


def num_tiles(said):
    (text,) = [record.message for record in said.records if " tiles on 2 ranks" in record.message]
    return int(text.split(" in ")[1].split()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_tiled_decode_is_stock_to_the_bit(kind, vaes, setting, said):
    given = latent(kind, batch=2 if kind == "image" else 1)
    before = given["samples"].clone()
    (ours,) = XDiTVAEDecodeTiled().decode(vae=vaes[kind], samples=given, pool=setting, **TILES)
    assert torch.equal(given["samples"], before)
    (stock,) = nodes.VAEDecodeTiled().decode(vae=vaes[kind], samples=given, **TILES)
    assert_same(ours, stock)
    assert num_tiles(said) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_tiled_encode_is_stock_to_the_bit(kind, vaes, setting, said):
    given = pixels(kind)
    (ours,) = XDiTVAEEncodeTiled().encode(vae=vaes[kind], pixels=given, pool=setting, **TILES)
    (stock,) = nodes.VAEEncodeTiled().encode(vae=vaes[kind], pixels=given, **TILES)
    assert_same(ours["samples"], stock["samples"])
    assert num_tiles(said) > 4


def test_a_video_without_tiles_is_one_ranks(vaes, setting, said):
    vae, given = vaes["video"], latent("video")
    (ours,) = XDiTVAEDecode().decode(vae=vae, samples=given, pool=setting)
    assert_same(ours, nodes.VAEDecode().decode(vae, given)[0])
    (encoded,) = XDiTVAEEncode().encode(vae=vae, pixels=pixels("video"), pool=setting)
    assert_same(encoded["samples"], nodes.VAEEncode().encode(vae, pixels("video"))[0]["samples"])
    assert said.text.count("by one rank, since a single one is not cut") == 2


def test_a_batch_of_videos_is_shared(vaes, setting, said):
    vae, given = vaes["video"], latent("video", batch=3)
    (ours,) = XDiTVAEDecode().decode(vae=vae, samples=given, pool=setting)
    # Stock decodes them at once; a convolution may then add up in another order.
    (stock,) = nodes.VAEDecode().decode(vae, given)
    assert ours.shape == stock.shape
    assert (ours - stock).abs().max() <= 1e-5
    assert "decoded as a batch on 2 ranks" in said.text


def test_a_tiny_autoencoder_is_carried(setting, said):
    weights = random_weights(comfy.taesd.taesd.TAESD(latent_channels=4))
    vae = comfy.sd.VAE(sd=weights, dtype=torch.float32)
    given = {"samples": torch.randn(1, 4, 8, 8)}
    (ours,) = XDiTVAEDecode().decode(vae=vae, samples=given, pool=setting)
    assert_same(ours, nodes.VAEDecode().decode(vae, given)[0])
    assert "TAESD (ComfyUI's class): decoded by one rank" in said.text


@pytest.mark.parametrize("kind", KINDS)
def test_where_memory_is_full_the_tiles_are_those_that_comfyui_takes(kind, vaes, setting, said, monkeypatch):
    vae, given = vaes[kind], latent(kind)
    on_pool = native_vae.VAEOnPool(vae, native_vae.source_of(vae, "decode"), setting, is_full=True)
    ours = on_pool.decode(given["samples"])
    real, calls = vae.first_stage_model.decode, []

    def full_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise comfy.model_management.OOM_EXCEPTION("full")
        return real(*args, **kwargs)

    monkeypatch.setattr(vae.first_stage_model, "decode", full_at_first)
    assert_same(ours, vae.decode(given["samples"]))
    assert "no memory on the workers to decode the whole; tiles are taken" in said.text


def test_a_picture_whose_bands_of_rows_find_no_memory_is_decoded_in_tiles(vaes, setting, said, monkeypatch):
    def full(*args):
        raise PoolError("no memory for the bands", kind="memory")

    given = latent("image")
    monkeypatch.setattr(vae_nodes, "_decode", full)
    (ours,) = XDiTVAEDecode().decode(vae=vaes["image"], samples=given, pool=setting)
    on_pool = native_vae.VAEOnPool(vaes["image"], native_vae.source_of(vaes["image"], "decode"), setting, is_full=True)
    assert_same(ours, on_pool.decode(given["samples"]))
    assert said.text.count("no memory on the workers to decode the whole; tiles are taken") == 2
    monkeypatch.setattr(native_vae.VAEOnPool, "decode", lambda *args: pytest.fail("only want of memory is"))

    def lost(*args):
        raise PoolError("a worker died", kind="lost")

    monkeypatch.setattr(vae_nodes, "_decode", lost)
    with pytest.raises(PoolError, match="a worker died"):
        XDiTVAEDecode().decode(vae=vaes["image"], samples=given, pool=setting)


@pytest.fixture
def alone(vaes):
    """The video VAE as a rank has it that is alone, in this process."""
    load = vae_remote.remote_vae(vaes["video"], native_vae.source_of(vaes["video"], "decode")).load
    return ComfyVAE(load, torch.device("cpu"))


def decoded(alone, given, tiling=None):
    message = m.RunVAE(job="job", vae=alone.key, does="decode", samples=given, tiling=tiling, is_batch=True)
    return alone.run(message, None, stop=lambda: False, done=lambda step, total: None)


def test_a_rank_that_finds_no_memory_for_the_whole_takes_tiles(vaes, alone, monkeypatch):
    given = torch.randn(1, 16, 2, 40, 4, generator=torch.Generator().manual_seed(2))
    for vae in (alone._vae, vaes["video"]):
        real = vae.first_stage_model.decode

        def only_tiles(tile, *args, real=real):
            if tile.shape == given.shape:
                raise comfy.model_management.OOM_EXCEPTION("full")
            return real(tile, *args)

        monkeypatch.setattr(vae.first_stage_model, "decode", only_tiles)
    ours, report = decoded(alone, given)
    assert report["full"] and report["tiles"] > 1
    assert_same(ours, vaes["video"].decode(given))


def test_one_that_is_let_go_of_is_gone(vaes):
    load = vae_remote.remote_vae(vaes["video"], native_vae.source_of(vaes["video"], "decode")).load
    another = ComfyVAE(load, torch.device("cpu"))
    assert another.bytes_held() > 0
    model = weakref.ref(another._vae.first_stage_model)
    del another
    gc.collect()
    assert model() is None, "ComfyUI's memory management holds it"


@pytest.mark.parametrize("tiling", [None, {"tile_x": 8, "tile_y": 8, "overlap": 2}], ids=["whole", "tiles"])
def test_a_model_that_draws_random_numbers_is_refused(tiling, alone, monkeypatch):
    real = alone._vae.first_stage_model.decode
    monkeypatch.setattr(alone._vae.first_stage_model, "decode", lambda tile: real(tile + torch.randn_like(tile)))
    with pytest.raises(InputError, match=r"WanVAE\) draws random numbers as it decodes"):
        decoded(alone, latent("video")["samples"], tiling)


def test_progress_is_shown_tile_by_tile(vaes, setting, said, monkeypatch):
    shown = []

    def hook(step, total, *rest, **named):
        shown.append((step, total))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    slow = dict(TILES, tile_size=64, overlap=32)
    XDiTVAEDecodeTiled().decode(vae=vaes["video"], samples=latent("video", batch=2), pool=setting, **slow)
    assert shown and {total for _, total in shown} == {num_tiles(said)}


def test_the_users_interruption_ends_the_tiles(vaes, setting, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupted(self):
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(native_vae.Follower, "_peek", interrupted)
        XDiTVAEDecodeTiled().decode(vae=vaes["video"], samples=latent("video", batch=4), pool=setting, **TILES)
    given = latent("image")
    (ours,) = XDiTVAEDecodeTiled().decode(vae=vaes["image"], samples=given, pool=setting, **TILES)
    assert_same(ours, nodes.VAEDecodeTiled().decode(vae=vaes["image"], samples=given, **TILES)[0])


def test_a_vae_that_is_made_of_more_than_its_weights_is_run_by_comfyui(setting, said):
    vae, given = video_vae(), latent("video")
    vae.process_output = lambda image: image
    (ours,) = XDiTVAEDecodeTiled().decode(vae=vae, samples=given, pool=setting, **TILES)
    assert_same(ours, nodes.VAEDecodeTiled().decode(vae=vae, samples=given, **TILES)[0])
    assert "itself, on one device: the workers' ComfyUI makes another WanVAE of its weights" in said.text


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_found_again_in_a_copy_of_its_weights(name):
    """As a worker makes it, which refuses another one."""
    weights, notes = file_of(name)
    vae = comfy.sd.VAE(sd=weights, metadata=notes, dtype=torch.bfloat16)
    load = vae_remote.remote_vae(vae, native_vae.source_of(vae, "encode")).load
    assert ComfyVAE(load, torch.device("cpu")).bytes_held() > 0


def test_one_that_is_known_to_draw_random_numbers_is_left_to_comfyui(vaes):
    vaes["video"].first_stage_model.timestep_conditioning = True
    try:
        with pytest.raises(ValueError, match="adds noise of its own when it decodes"):
            native_vae.source_of(vaes["video"], "decode")
        native_vae.source_of(vaes["video"], "encode")
    finally:
        del vaes["video"].first_stage_model.timestep_conditioning


def test_the_hash_tells_settings_apart_but_not_weights(vaes):
    same, other = video_vae(), video_vae()
    with torch.no_grad():
        same.first_stage_model.conv2.weight.zero_()
    assert vae_hash(same) == vae_hash(vaes["video"])
    same.decode(latent("video")["samples"])
    assert vae_hash(same) == vae_hash(vaes["video"]), "what a run leaves on the layers is none of it"
    other.first_stage_model.decoder.conv1.padding_mode = "circular"
    assert vae_hash(other) != vae_hash(vaes["video"])


def test_vaes_of_sound_are_not_carried(vaes, monkeypatch):
    for name, value in {"latent_dim": 1, "extra_1d_channel": 16, "output_channels": 2}.items():
        with monkeypatch.context() as patched, pytest.raises(ValueError, match="a WanVAE, which is not for pictures"):
            patched.setattr(vaes["video"], name, value)
            native_vae.source_of(vaes["video"], "decode")


@pytest.mark.parametrize("change", ["hook", "method"])
def test_others_are_run_by_comfyui_and_the_log_says_so(change, said):
    vae = video_vae()
    if change == "hook":
        vae.first_stage_model.decoder.register_forward_hook(lambda *args: None)
    else:
        vae.decode_tiled = vae.decode_tiled
    given = latent("video")
    (ours,) = XDiTVAEDecodeTiled().decode(vae=vae, samples=given, **TILES)
    assert torch.equal(ours, nodes.VAEDecodeTiled().decode(vae=vae, samples=given, **TILES)[0])
    reason = "another node changed it" + {"hook": "s decoder", "method": ""}[change]
    assert f"ComfyUI decodes with this VAE itself, on one device: {reason}" in said.text


@pytest.mark.parametrize(
    "ours,stock", [(XDiTVAEDecodeTiled, nodes.VAEDecodeTiled), (XDiTVAEEncodeTiled, nodes.VAEEncodeTiled)]
)
def test_inputs_are_the_stock_ones(ours, stock):
    required, theirs = ours.INPUT_TYPES()["required"], stock.INPUT_TYPES()["required"]
    assert {name: kind for name, (kind, _) in required.items()} == {name: kind for name, (kind, *_) in theirs.items()}
    assert list(required) == list(theirs)
    for name, (_, *rest) in theirs.items():
        assert (rest[0] if rest else {}).items() <= required[name][1].items()
    assert all("tooltip" in entry[1] for group in ours.INPUT_TYPES().values() for entry in group.values())
    assert (ours.RETURN_TYPES, ours.FUNCTION) == (stock.RETURN_TYPES, stock.FUNCTION)
    assert inspect.signature(getattr(ours, ours.FUNCTION)).parameters["tiling"].kind is inspect.Parameter.VAR_KEYWORD
