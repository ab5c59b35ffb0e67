"""The demo without a pool: its files, its words and pictures, and sampling on one rank in this process."""

import json
import random

import pytest
import torch
from comfy_xdit_training.autoencoder import ldm_state_dict, new_vae, normalise
from comfy_xdit_worker.service import Service
from safetensors import safe_open

from comfy_xdit.demo import assets, conditioning, words
from comfy_xdit.demo.pictures import (
    COLOURS,
    SHAPES,
    as_pictures,
    as_tensor,
    contact_sheet,
    draw,
    random_scene,
)
from comfy_xdit.demo.run import TOLERANCE, Row, modes, row_difference, table
from comfy_xdit.demo.sampling import Settings, decode, load_model, load_vae, sample
from comfy_xdit.demo.through_comfyui import WORKFLOW, variant
from comfy_xdit.models import detect
from comfy_xdit.models.lora_file import read_lora
from comfy_xdit.parallel.spec import ModelShape, ParallelSpec
from comfy_xdit.timeline.picture import timeline
from comfy_xdit.vae.layout import describe, translate
from comfy_xdit.weights.header import read_header

LIMIT_BYTES = 12_000_000


class OneRank:
    """A pool of one rank in this process."""

    def __init__(self):
        self.service = Service(rank=0, world_size=1, device=torch.device("cpu"))

    def call_all(self, message):
        return [self.service.handle(message)]


@pytest.fixture(scope="module")
def rank():
    one = OneRank()
    load_model(one)
    load_vae(one)
    return one


def test_all_files_are_there_and_small():
    assets.check()
    assert sum(file.stat().st_size for file in assets.FOLDER.iterdir()) <= LIMIT_BYTES


def test_every_prompt_has_its_conditioning():
    assert set(conditioning.prompts(str(assets.CONDITIONING))) == {*words.PROMPTS, ""}
    for prompt in (*words.PROMPTS, ""):
        context, pooled = conditioning.load(str(assets.CONDITIONING), prompt)
        torch.testing.assert_close(context, words.encode(prompt)[0])
        torch.testing.assert_close(pooled, words.encode(prompt)[1])


def test_an_unknown_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'a green dog' is not in .*; it has ''"):
        conditioning.load(str(assets.CONDITIONING), "a green dog")
    with pytest.raises(ValueError, match="holds no conditioning"):
        conditioning.prompts(str(assets.LORA))


def test_word_order_matters():
    there, back = (words.encode(f"a {a} circle on a {b} ground") for a, b in (("red", "blue"), ("blue", "red")))
    assert (there[1] - back[1]).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_shows_its_scene(shape):
    scene = random_scene(random.Random(3), prompt=f"a large red {shape} on a blue ground")
    colours = {colour: number for number, colour in draw(scene).getcolors(1 << 14)}
    counts = sorted(colours.items(), key=lambda item: -item[1])[:2]
    assert {colour for colour, _ in counts} == {COLOURS["red"], COLOURS["blue"]}


def test_pictures_survive_being_tensors():
    picture = draw(random_scene(random.Random(1)), outlined=True)
    (back,) = as_pictures(as_tensor([picture]))
    assert back.tobytes() == picture.tobytes()


def test_vae_keys_are_those_that_comfyui_has():
    vae = new_vae()
    exported = ldm_state_dict(vae)
    config = describe({key: tuple(tensor.shape) for key, tensor in exported.items()})
    assert config.block_out_channels == (64, 64, 64, 64) and config.layers_per_block == 1
    assert {translate(key, 4) for key in exported} == set(vae.state_dict())


@torch.no_grad()
def test_normalised_latents_have_the_scale_of_flux():
    torch.manual_seed(0)
    vae = new_vae()
    images = torch.randn(2, 3, 128, 128)
    before = vae.decode(vae.encode(images).latent_dist.mean).sample
    normalise(vae, images)
    latent = vae.encode(images).latent_dist.mean
    seen = (latent - assets.SHIFT) * assets.SCALE
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(16), atol=1e-3, rtol=0)
    # The borders see the padding, which the new scale shifts.
    inside = (..., slice(56, 72), slice(56, 72))
    assert (vae.decode(latent).sample[inside] - before[inside]).abs().mean() < 0.1 * before[inside].std()


def test_the_lora_changes_the_picture_and_comes_off_again(rank, tmp_path):
    infos = read_header(str(assets.MODEL))
    patches = read_lora(str(assets.LORA), detect(infos)[0], infos)
    settings = Settings(prompts=words.PROMPTS[2:4], num_steps=2)
    plain = sample(rank, settings, ParallelSpec())
    outlined = sample(rank, settings, ParallelSpec(), patches_id="lora", patches=patches)
    again = sample(rank, settings, ParallelSpec())
    assert torch.equal(plain.latents, again.latents)
    row = Row(mode="x", num_ranks=1, plain=plain, outlined=outlined)
    swapped = Row(mode="y", num_ranks=1, plain=outlined, outlined=plain)
    assert row_difference(row, row) == 0
    assert row_difference(swapped, row) > TOLERANCE
    assert "y" in table([row, swapped], settings)
    assert timeline({"x": plain}).width > 0


def test_a_pictures_colours_are_those_of_its_prompt(rank):
    settings = Settings(prompts=("a red cross on a black ground", "a white square on a blue ground"), num_steps=8)
    images = decode(rank, sample(rank, settings, ParallelSpec()).latents)
    middle, corner = images[:, :, 60:68, 60:68].mean((2, 3)), images[:, :, 4:12, 4:12].mean((2, 3))
    for image, (shape, ground) in enumerate((("red", "black"), ("white", "blue"))):
        for seen, wanted in ((middle[image], shape), (corner[image], ground)):
            colours = {name: torch.tensor(rgb) / 127.5 - 1 for name, rgb in COLOURS.items()}
            nearest = min(colours, key=lambda name: float((colours[name] - seen).norm()))
            assert nearest == wanted, f"{settings.prompts[image]}: {nearest} in place of {wanted}"


def test_modes_are_those_that_the_ranks_allow():
    shape = ModelShape(title="tiny", num_heads=2, num_blocks=2)
    assert [str(spec) for spec in modes(2, shape)] == ["ulysses=2", "ring=2", "cfg=2", "dp=2"]
    assert all(spec.num_ranks == 4 and spec.ulysses <= 2 for spec in modes(4, shape))
    assert [spec.degrees["ring"] for spec in modes(3, shape)] == [3, 1]


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_variants_of_the_workflow_are_whole(ours, lora):
    prompt = variant(json.loads(WORKFLOW.read_text()), ours=ours, lora=lora)
    links = [value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert set(links) | {"save"} == set(prompt)
    assert ("LoraLoaderModelOnly" in [node["class_type"] for node in prompt.values()]) == lora
    kinds = {node["class_type"] for node in prompt.values()}
    assert ("KSampler" in kinds) != ours and ("XDiTKSampler" in kinds) == ours


def test_the_workflow_names_the_demos_files():
    text = WORKFLOW.read_text()
    for file in (assets.MODEL, assets.VAE, assets.LORA, assets.CONDITIONING):
        assert f'"{file.name}"' in text


def test_a_contact_sheet_has_room_for_all():
    pictures = [draw(random_scene(random.Random(seed))) for seed in range(3)]
    sheet = contact_sheet([pictures, pictures], ["one", "two", "three"], ["a", "b"])
    assert sheet.width >= 3 * 128 and sheet.height >= 2 * 128


def test_the_files_are_half_precision():
    with safe_open(str(assets.MODEL), "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
