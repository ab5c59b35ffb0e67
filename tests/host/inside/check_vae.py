"""The VAE nodes against the stock ones: the same images and latents, on one rank and on a pool of two."""

import contextlib
import copy
import gc
import importlib.util
import logging
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.taesd.taesd
import comfy_xdit_nodes.vae_remote as vae_remote
import pytest
import torch
from check_residency import until
from comfy_xdit_bench.vae_checkpoint import random_vae
from comfy_xdit_nodes import residency
from comfy_xdit_nodes.pool import PoolSetting
from comfy_xdit_nodes.vae import XDiTVAEDecode, XDiTVAEEncode

import nodes
from comfy_xdit import messages as m
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.network import Network
from comfy_xdit.vae import load_vae
from comfy_xdit.weights.stamp import stamp

spec = importlib.util.spec_from_file_location("tiny_vae", Path(__file__).resolve().parents[2] / "tiny_vae.py")
tiny_vae = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vae)

# The widths are ComfyUI's: it builds no others.
WIDTHS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
KINDS = {
    "flux": tiny_vae.config(**WIDTHS, latent_channels=16, quant_conv=False, post_quant_conv=False),
    "sd1": tiny_vae.config(**WIDTHS),
}


class OneRank:
    """A pool inside the process. log: the kinds of the messages."""

    name, devices, num_ranks, network = "fake", ["cpu"], 1, None

    def __init__(self):
        self.vaes, self.log = {}, []

    def status(self):
        return {}

    @contextlib.contextmanager
    def lease(self, poll=None):
        yield

    def call(self, message, *, poll=None):
        message = m.decode(*m.encode(message))
        self.log.append(type(message).__name__)
        return m.Result(value=getattr(self, "on_" + type(message).__name__)(message))

    def on_LoadVAE(self, message):
        assert message.stamp == stamp(message.path), "a worker refuses it"
        if message.vae not in self.vaes:
            self.vaes[message.vae] = load_vae(message, "cpu")

    def on_VAEDecode(self, message):
        return self.vaes[message.vae].decode(message.latent)

    def on_VAEEncode(self, message):
        return self.vaes[message.vae].encode(message.image)

    def on_Unload(self, message):
        for key in message.keys:
            self.vaes.pop(key, None)


@pytest.fixture
def pool(monkeypatch):
    pool = OneRank()
    monkeypatch.setattr(vae_remote, "connect", lambda setting: pool)
    yield pool
    mm.unload_all_models()


@pytest.fixture(scope="module", params=KINDS)
def vae(request):
    return comfy.sd.VAE(sd=random_vae(KINDS[request.param]), dtype=torch.float32)


@pytest.fixture(scope="module")
def flux_vae():
    return comfy.sd.VAE(sd=random_vae(KINDS["flux"]), dtype=torch.float32)


def tiny_autoencoder():
    sd = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    return comfy.sd.VAE(sd={key: torch.randn(value.shape) * 0.05 for key, value in sd.items()})


def random_latent(vae, batch, height, width):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(batch, vae.latent_channels, height, width, generator=generator)


def assert_equal(ours, stock):
    assert (ours.shape, ours.dtype, ours.device) == (stock.shape, stock.dtype, stock.device)
    assert stock.std() > 0.01
    worst = (ours - stock).abs().max().item()
    assert worst <= 1e-5 * max(1.0, stock.abs().max().item()), worst


def test_a_pool_on_several_machines_is_refused(flux_vae, pool):
    pool.network = Network(num_machines=2, interface="eth0", address="10.0.0.1")
    with pytest.raises(ValueError, match=r"is on 2 machines, and this VAE has no file .*; use ComfyUI's own VAE node"):
        XDiTVAEDecode().decode(vae=flux_vae, samples={"samples": random_latent(flux_vae, 1, 8, 8)})
    assert not pool.log, "a worker was touched"


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 7, 5)])
def test_decode_equals_stock(vae, pool, size):
    samples = {"samples": random_latent(vae, *size)}
    before = samples["samples"].clone()
    (ours,) = XDiTVAEDecode().decode(vae=vae, samples=samples)
    assert torch.equal(samples["samples"], before)
    assert_equal(ours, nodes.VAEDecode().decode(vae=vae, samples=samples)[0])
    assert pool.log[-2:] == ["LoadVAE", "VAEDecode"]


@pytest.mark.parametrize("size", [(1, 64, 64, 3), (2, 45, 70, 4)])
def test_encode_equals_stock(vae, pool, size):
    pixels = torch.rand(size, generator=torch.Generator().manual_seed(3))
    before = pixels.clone()
    (ours,) = XDiTVAEEncode().encode(vae=vae, pixels=pixels)
    assert torch.equal(pixels, before)
    (stock,) = nodes.VAEEncode().encode(vae=vae, pixels=pixels)
    assert ours.keys() == stock.keys()
    assert_equal(ours["samples"], stock["samples"])
    assert pool.log[-2:] == ["LoadVAE", "VAEEncode"]


@pytest.mark.parametrize("colour", [(0.5, 0.5, 0.5), (0.0, 0.0, 1.0)], ids=["grey", "blue"])
def test_a_picture_of_one_colour_is_encoded_as_in_double_precision(colour, flux_vae, pool):
    """Stock is 1e-4 to 1e-3 off there on a CPU: torch's group norm of channels-last tensors takes the small variance
    as a difference of two large numbers. On pixels that lie channels first stock is where we are.
    """
    pixels = torch.tensor(colour).expand(1, 64, 64, 3).contiguous()
    (ours,) = XDiTVAEEncode().encode(vae=flux_vae, pixels=pixels)
    double = copy.deepcopy(flux_vae.first_stage_model).double()
    exact = double.encode(pixels.movedim(-1, 1).contiguous().double() * 2 - 1)
    exact = exact[0] if isinstance(exact, tuple) else exact
    assert (ours["samples"] - exact).abs().max() <= 1e-5
    channels_first = pixels.movedim(-1, 1).contiguous().movedim(1, -1)
    (stock,) = nodes.VAEEncode().encode(vae=flux_vae, pixels=channels_first)
    assert_equal(ours["samples"], stock["samples"])


def test_one_frame_of_a_video_latent(flux_vae, pool):
    latent = random_latent(flux_vae, 1, 6, 6)
    (ours,) = XDiTVAEDecode().decode(vae=flux_vae, samples={"samples": latent[:, :, None]})
    assert_equal(ours, nodes.VAEDecode().decode(vae=flux_vae, samples={"samples": latent})[0])


def test_weights_are_handed_over_once_and_unload_models_frees_them(flux_vae, pool):
    samples = {"samples": random_latent(flux_vae, 1, 4, 4)}
    for _ in range(2):
        XDiTVAEDecode().decode(vae=flux_vae, samples=samples)
    assert len(pool.vaes) == 1
    (key,) = pool.vaes
    mm.free_memory(5e10, mm.get_torch_device())
    assert pool.vaes, "memory pressure on the host must not unload the workers"
    mm.unload_all_models()
    assert not pool.vaes
    XDiTVAEDecode().decode(vae=flux_vae, samples=samples)
    assert list(pool.vaes) == [key]


def test_a_vae_that_is_gone_is_unloaded_with_its_file(pool, flux_vae):
    other = comfy.sd.VAE(sd=random_vae(KINDS["sd1"]), dtype=torch.float32)
    XDiTVAEDecode().decode(vae=other, samples={"samples": random_latent(other, 1, 2, 2)})
    (key,) = pool.vaes
    path = Path(vae_remote.remote_vae(other).load.path)
    assert path.exists()
    del other
    gc.collect()
    assert not path.exists()
    until(lambda: key not in pool.vaes)
    mm.cleanup_models_gc()
    XDiTVAEDecode().decode(vae=flux_vae, samples={"samples": random_latent(flux_vae, 1, 2, 2)})


def test_unloading_a_vae_starts_no_pool_and_does_not_hang(flux_vae, pool, monkeypatch, caplog):
    XDiTVAEDecode().decode(vae=flux_vae, samples={"samples": random_latent(flux_vae, 1, 4, 4)})
    monkeypatch.setattr(residency, "UNLOAD_PATIENCE_S", 0.05)

    def busy(message, *, poll=None):
        while True:
            poll()

    monkeypatch.setattr(pool, "call", busy)
    mm.unload_all_models()
    assert "could not unload a VAE" in caplog.text and "busy with another client's job" in caplog.text

    def stopped():
        raise PoolError("no pool 'fake' runs")

    monkeypatch.setattr(pool, "status", stopped)
    monkeypatch.setattr(pool, "call", lambda *args, **kwargs: pytest.fail("it would start the pool"))
    vae_remote.remote_vae(flux_vae)._residency.unload()


def test_vaes_that_are_not_carried_are_run_by_comfyui_and_the_log_says_so(pool, caplog):
    vae = tiny_autoencoder()
    vae.first_stage_model.taesd_decoder.register_forward_hook(lambda *args: None)
    samples = {"samples": random_latent(vae, 1, 8, 8)}
    with caplog.at_level(logging.INFO, "comfy_xdit"):
        (ours,) = XDiTVAEDecode().decode(vae=vae, samples=samples)
        (latent,) = XDiTVAEEncode().encode(vae=vae, pixels=ours)
    assert torch.equal(ours, nodes.VAEDecode().decode(vae=vae, samples=samples)[0])
    assert torch.equal(latent["samples"], nodes.VAEEncode().encode(vae=vae, pixels=ours)[0]["samples"])
    for does in ("decodes", "encodes"):
        assert f"ComfyUI {does} with this VAE itself, on one device: " in caplog.text
    assert not pool.log


def test_a_changed_vae_is_decoded_by_comfyui(flux_vae, pool, caplog, monkeypatch):
    conv = flux_vae.first_stage_model.decoder.conv_out
    monkeypatch.setattr(conv, "padding_mode", "circular")
    with caplog.at_level(logging.INFO, "comfy_xdit"):
        XDiTVAEDecode().decode(vae=flux_vae, samples={"samples": random_latent(flux_vae, 1, 4, 4)})
    assert "changed its decoder.conv_out" in caplog.text and not pool.log


def test_bad_inputs_are_sentences(flux_vae, pool, monkeypatch):
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\] does not fit this VAE, which decodes 16 channels"):
        XDiTVAEDecode().decode(vae=flux_vae, samples={"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="at least 8 x 8 pixels"):
        XDiTVAEEncode().encode(vae=flux_vae, pixels=torch.zeros(1, 7, 64, 3))
    with pytest.raises(ValueError, match="3 or 4 channels"):
        XDiTVAEEncode().encode(vae=flux_vae, pixels=torch.zeros(1, 64, 64, 1))
    assert not pool.log


@pytest.mark.parametrize("ours,stock", [(XDiTVAEDecode, nodes.VAEDecode), (XDiTVAEEncode, nodes.VAEEncode)])
def test_inputs_are_the_stock_ones(ours, stock):
    required = ours.INPUT_TYPES()["required"]
    assert {name: kind[0] for name, kind in required.items()} == {
        name: kind[0] for name, kind in stock.INPUT_TYPES()["required"].items()
    }
    assert list(required) == list(stock.INPUT_TYPES()["required"])
    assert ours.INPUT_TYPES()["optional"]["pool"][0] == "XDIT_POOL"
    assert all("tooltip" in entry[1] for group in ours.INPUT_TYPES().values() for entry in group.values())
    assert (ours.RETURN_TYPES, ours.FUNCTION) == (stock.RETURN_TYPES, stock.FUNCTION)


def test_two_ranks_equal_stock(flux_vae):
    from comfy_xdit.pool.stop import stop

    setting = PoolSetting(name="check-vae", devices="cpu:2")
    samples = {"samples": random_latent(flux_vae, 2, 9, 8)}
    try:
        (ours,) = XDiTVAEDecode().decode(vae=flux_vae, samples=samples, pool=setting)
        (latent,) = XDiTVAEEncode().encode(vae=flux_vae, pixels=ours, pool=setting)
    finally:
        mm.unload_all_models()
        with contextlib.suppress(ConnectionError):
            stop("check-vae")
    assert_equal(ours, nodes.VAEDecode().decode(vae=flux_vae, samples=samples)[0])
    assert_equal(latent["samples"], nodes.VAEEncode().encode(vae=flux_vae, pixels=ours)[0]["samples"])
