"""The VAE's layout, its loading and its errors, on one process."""

import importlib.util
from pathlib import Path

import pytest
import torch
from comfy_xdit_bench.vae_checkpoint import ldm_shapes, random_vae, write_vae
from safetensors.torch import save_file

from comfy_xdit.messages import LoadVAE
from comfy_xdit.vae import VAEConfig, describe, load_vae
from comfy_xdit.vae.layout import translate
from comfy_xdit.vae.resident import memory_errors

spec = importlib.util.spec_from_file_location("tiny_vae", Path(__file__).with_name("tiny_vae.py"))
assert spec is not None and spec.loader is not None
tiny_vae = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vae)

SD1 = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
PUBLISHED = {
    "sd1": tiny_vae.config(**SD1),
    "sd3": tiny_vae.config(**SD1, latent_channels=16, quant_conv=False, post_quant_conv=False),
    "x4-upscaler": tiny_vae.config(block_out_channels=(128, 256, 512), layers_per_block=2),
    "tiny": tiny_vae.config(),
    "no-attention": tiny_vae.config(attention=False, quant_conv=False),
}


def load(path: Path, dtype: str = "float32"):
    return load_vae(LoadVAE(vae="v", path=str(path), dtype=dtype), "cpu")


@pytest.mark.parametrize("cfg", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_config_is_read_from_shapes(cfg: VAEConfig) -> None:
    assert describe(ldm_shapes(cfg)) == cfg
    prefixed = {f"first_stage_model.{key}": shape for key, shape in ldm_shapes(cfg).items()}
    found = describe(prefixed | {"model.diffusion_model.x_embedder.proj.weight": [1]})
    assert (found.prefix, found.block_out_channels) == ("first_stage_model.", cfg.block_out_channels)


@pytest.mark.parametrize("cfg", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_every_weight_of_diffusers_is_named_once(cfg: VAEConfig) -> None:
    depth = len(cfg.block_out_channels)
    names = [translate(key, depth) for key in ldm_shapes(cfg)]
    assert sorted(map(str, names)) == sorted(name for name, _ in cfg.build().named_parameters())


@pytest.mark.parametrize("cfg", [PUBLISHED["sd1"], PUBLISHED["sd3"]], ids=["sd1", "sd3"])
def test_names_agree_with_diffusers_converter(cfg: VAEConfig) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    # Numbered tensors: what comes out under a name says which key went in.
    keys = list(ldm_shapes(cfg))
    checkpoint = {
        key: torch.full((1,) * len(shape), float(i)) for i, (key, shape) in enumerate(ldm_shapes(cfg).items())
    }
    depth = len(cfg.block_out_channels)
    theirs = convert_ldm_vae_checkpoint(checkpoint, {"down_block_types": [""] * depth, "up_block_types": [""] * depth})
    assert {name: keys[int(value.flatten()[0])] for name, value in theirs.items()} == {
        translate(key, depth): key for key in keys
    }


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_decode_and_encode_equal_diffusers(tmp_path: Path, prefix: str) -> None:
    cfg = tiny_vae.config(latent_channels=16, quant_conv=False, post_quant_conv=False)
    vae = load(write_vae(tmp_path / "vae.safetensors", cfg, prefix=prefix))
    reference = tiny_vae.reference(cfg, random_vae(cfg))
    latent, image = torch.randn(2, 16, 5, 7), torch.rand(2, 3, 22, 29) * 2 - 1
    with torch.no_grad():
        expected = reference.decode(latent).sample, reference.encode(image).latent_dist.parameters
    torch.testing.assert_close(vae.decode(latent), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.encode(image), expected[1], atol=1e-5, rtol=0)


def test_16_bit_weights_are_kept_in_their_type(tmp_path: Path) -> None:
    vae = load(write_vae(tmp_path / "vae.safetensors", tiny_vae.config()), "bfloat16")
    image = vae.decode(torch.randn(1, 4, 4, 4))
    assert image.dtype is torch.bfloat16
    assert vae.bytes_held() == 2 * sum(t.numel() for t in random_vae(tiny_vae.config()).values())


def without(part: str):
    return lambda shapes: {key: shape for key, shape in shapes.items() if not key.startswith(part)}


REFUSED = {
    "tiny autoencoder": (lambda s: {"taesd_decoder.1.weight": [64, 16, 3, 3]}, "no decoder.conv_in"),
    "video": (lambda s: s | {"decoder.conv_in.weight": [64, 4, 3, 3, 3]}, "decoder.conv_in"),
    "temporal decoder": (lambda s: s | {"decoder.mid.block_1.mix_factor": [1]}, "mix_factor"),
    "normalised latents": (lambda s: s | {"bn.running_mean": [16]}, "bn.running_mean"),
    "attention in stages": (lambda s: s | {"decoder.up.1.attn.0.q.weight": [64, 64, 1, 1]}, "attn"),
    "another decoder": (lambda s: s | {"decoder.up.0.block.0.conv1.weight": [64, 64, 3, 3]}, "widths"),
    "decoder only": (without("encoder."), "widths"),
    "four channels": (lambda s: s | {"decoder.conv_out.weight": [4, 32, 3, 3]}, "decoder.conv_out"),
    "narrow": (
        lambda s: ldm_shapes(tiny_vae.config(block_out_channels=(16, 32))),
        "multiples of 32",
    ),
}


@pytest.mark.parametrize("change,words", REFUSED.values(), ids=REFUSED.keys())
def test_other_vaes_are_refused_by_name(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        describe(change(ldm_shapes(tiny_vae.config())))


def test_files_that_lack_weights_are_refused(tmp_path: Path) -> None:
    weights = random_vae(tiny_vae.config())
    path = tmp_path / "vae.safetensors"
    save_file({key: value for key, value in weights.items() if key != "decoder.norm_out.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 weights .* decoder\.conv_norm_out\.bias"):
        load(path)
    weights["decoder.mid.block_1.conv1.weight"] = torch.zeros(64, 32, 3, 3)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"decoder\.mid\.block_1\.conv1\.weight is \[64, 32, 3, 3\]"):
        load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"vae\.safetensors"):
        load(path)


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    vae = load(write_vae(tmp_path / "vae.safetensors", tiny_vae.config()))
    with pytest.raises(ValueError, match=r"\[1, 16, 4, 4\] does not fit .* \[batch, 4, height, width\]"):
        vae.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match="at least 4 rows"):
        vae.encode(torch.zeros(1, 3, 3, 8))
    with pytest.raises(ValueError, match="use float32"):
        load(tmp_path / "vae.safetensors", "int8")


def test_full_memory_says_for_what() -> None:
    with pytest.raises(MemoryError, match=r"VAE of \[1\]; .* tiles"), memory_errors("VAE of [1]"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError, match="VAE"), memory_errors("VAE"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="size mismatch"), memory_errors("VAE"):
        raise RuntimeError("size mismatch")
