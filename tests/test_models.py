"""Families: what is recognised, what its sizes are, and what is refused with which words."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit.models import FAMILIES, comfy_layout, detect
from comfy_xdit.models.flux import FLUX, axes_dims
from comfy_xdit.models.pixart import PIXART
from comfy_xdit.models.sd3 import SD3
from comfy_xdit.weights.header import TensorInfo
from comfy_xdit.weights.slices import slice_map

TINY = {"flux": tiny.flux_shapes(), "sd3": tiny.sd3_shapes(), "pixart": tiny.pixart_shapes()}


def header(shapes, prefix="", dtype="BF16"):
    return {prefix + key: TensorInfo(dtype=dtype, shape=shape, begin=0, end=0) for key, shape in shapes.items()}


REAL_FLUX = tiny.flux_shapes(
    heads=24, head_dim=128, depth=19, depth_single=38, context=4096, vec=768, channels=64, out_channels=64
)
REAL_SIGMA = tiny.pixart_shapes(heads=16, depth=28, context=4096, positions=64, null_tokens=300)
REAL_ALPHA = tiny.pixart_shapes(heads=16, depth=28, context=4096, alpha=True, null_tokens=120)
REAL_MEDIUM = tiny.sd3_shapes(heads=24, depth=24, context=4096, vec=2048, channels=16, side=384, dual=tuple(range(13)))


def test_flux_dev_is_diffusers_flux_dev():
    config = FLUX.config(header(REAL_FLUX))
    assert config == {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }


def test_sd35_medium_is_diffusers_sd35_medium():
    config = SD3.config(header(REAL_MEDIUM))
    assert config == {
        "sample_size": 768,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }


def test_pixart_is_diffusers_pixart():
    """Of 1024 pixels: the sizes are the class' own defaults, but for the text's."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        published = dict(PixArtTransformer2DModel(caption_channels=4096).config)
    for shapes, scale, sized in ((REAL_SIGMA, 2, False), (REAL_ALPHA, None, True)):
        config = PIXART.config(header(shapes))
        changes = {"interpolation_scale": scale, "use_additional_conditions": sized}
        assert published | config == published | changes


@pytest.mark.parametrize(
    ("family", "shapes"),
    [(FLUX, REAL_FLUX), (SD3, REAL_MEDIUM), (PIXART, REAL_SIGMA), (PIXART, REAL_ALPHA)],
    ids=["flux", "sd35", "sigma", "alpha"],
)
def test_real_sizes_fill_the_diffusers_model(family, shapes):
    """Every weight of the model, in its shape: nothing is left on the meta device after loading."""
    infos = header(shapes)
    with torch.device("meta"):
        model = family.model_class()(**family.config(infos))
    slices = slice_map(family.table(infos), infos)
    made = {
        target: (sum(piece.rows for piece in pieces), *shapes[pieces[0].source][1:])
        for target, pieces in slices.items()
    }
    assert made == {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_variants():
    fill = FLUX.config(header(tiny.flux_shapes(channels=96, guidance=False)))
    assert (fill["in_channels"], fill["out_channels"], fill["guidance_embeds"]) == (96, 16, False)
    plain = SD3.config(header(tiny.sd3_shapes(qk_norm=False, dual=(), heads=3)))
    assert (plain["qk_norm"], plain["dual_attention_layers"], plain["num_attention_heads"]) == (None, (), 3)
    for positions, scale in ((None, None), (32, 1), (64, 2), (128, 4)):
        assert PIXART.config(header(tiny.pixart_shapes(positions=positions)))["interpolation_scale"] == scale


@given(head_dim=st.integers(1, 128).map(lambda half: 2 * half))
def test_axes_fill_the_head_with_even_parts(head_dim):
    axes = axes_dims(head_dim)
    assert sum(axes) == head_dim and all(axis >= 0 and axis % 2 == 0 for axis in axes)
    assert axes[1] == axes[2] and abs(axes[1] - head_dim * 7 / 16) < 2


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize(("name", "shapes"), TINY.items())
def test_detect(name, shapes, prefix):
    beside = {} if not prefix else header({"text_encoders.scaled_fp8": (1,), "vae.x.weight": (4, 4)}, dtype="U8")
    assert detect(header(shapes, prefix) | beside) == (FAMILIES[name], prefix)


@pytest.mark.parametrize("name", TINY)
def test_detect_diffusers_layout(name):
    family, shapes = FAMILIES[name], {k: s for k, s in TINY[name].items() if not k.endswith("y_embedding")}
    infos = header(shapes)
    slices = slice_map(family.table(infos), infos)
    own = {
        target: (sum(piece.rows for piece in pieces), *shapes[pieces[0].source][1:])
        for target, pieces in slices.items()
    }
    assert detect(header(own)) == (family, "")
    layout, is_comfy = comfy_layout(family, header(own))
    assert not is_comfy and {key: info.shape for key, info in layout.items()} == shapes
    assert comfy_layout(family, infos) == (infos, True)
    if name == "pixart":
        older = header(own | {"pos_embed.pos_embed": (1, 64, 144), "caption_projection.y_embedding": (9, 24)})
        layout, _ = comfy_layout(family, older)
        assert {key: info.shape for key, info in layout.items()} == shapes


@pytest.mark.parametrize(
    ("extra", "dtype", "says"),
    [
        ("scaled_fp8", "F8_E4M3", "in scaled fp8"),
        ("double_blocks.0.img_attn.qkv.scale_weight", "F32", "in scaled fp8"),
        ("double_blocks.0.img_attn.qkv.weight_scale", "F32", "in scaled fp8"),
        ("double_blocks.0.img_attn.qkv.comfy_quant", "U8", "in ComfyUI's quantised layout"),
        ("double_blocks.0.img_attn.qkv.weight.absmax", "F32", "in bitsandbytes"),
        ("double_blocks.0.qkv_proj.qweight", "I8", "in SVDQuant"),
        ("odd.weight", "U8", "odd.weight as U8"),
    ],
)
def test_quantised_layouts_are_refused(extra, dtype, says):
    for prefix in ("", "model.diffusion_model."):
        infos = header(tiny.flux_shapes(), prefix) | header({extra: (1,)}, prefix, dtype)
        with pytest.raises(ValueError) as caught:
            detect(infos)
        assert says in str(caught.value) and "supported" in str(caught.value)
        assert str(caught.value).startswith("this Flux.1 checkpoint")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("distilled_guidance_layer.in_proj.weight", "holds Chroma;"),
        ("model.diffusion_model.input_blocks.0.0.weight", "holds Stable Diffusion 1, 2 or XL;"),
        ("blocks.0.cross_attn.norm_k.weight", "holds Wan;"),
        ("who.knows", "no diffusion transformer that we know (1 weights, first: who.knows);"),
        (None, "no diffusion transformer that we know (0 weights, first: none);"),
    ],
)
def test_other_models_are_named(key, says):
    with pytest.raises(ValueError) as caught:
        detect(header({key: (1,)} if key else {}))
    assert says in str(caught.value) and "supported are Flux.1" in str(caught.value)


@pytest.mark.parametrize("shapes", [*TINY.values(), tiny.pixart_shapes(positions=32, alpha=True)], ids=[*TINY, "alpha"])
def test_odd_shapes_are_sentences(shapes):
    """Every weight in turn missing, empty, or with other dims: a config, or a ValueError of ours."""
    family, _ = detect(header(shapes))
    for key in shapes:
        for shape in (None, (), (0,), (0, 0), (1, 2, 3), (5,)):
            infos = header(
                shapes | {key: shape} if shape is not None else {k: s for k, s in shapes.items() if k != key}
            )
            try:
                layout, _ = comfy_layout(family, infos)
                family.config(layout)
                slice_map(family.table(layout), layout)
            except ValueError as error:
                words = ("missing", "damaged", "incomplete", "this is no ", "no place", "divide", "multiple")
                assert any(word in str(error) for word in words), str(error)


@pytest.mark.parametrize(
    ("shapes", "change", "says"),
    [
        (
            tiny.flux_shapes(),
            {"double_blocks.0.img_attn.norm.query_norm.scale": (12,)},
            "heads of 12 channels",
        ),
        (tiny.sd3_shapes(), {"pos_embed": (1, 145, 128)}, "not square"),
        (tiny.sd3_shapes(), {"x_embedder.proj.weight": (100, 4, 2, 2)}, "no multiple of 64"),
        (tiny.pixart_shapes(), {"x_embedder.proj.weight": (100, 4, 2, 2)}, "PixArt's width is 100, no multiple of 72"),
        (tiny.pixart_shapes(), {"final_layer.linear.weight": (16, 144)}, "16 numbers a token instead of 32"),
        (tiny.pixart_shapes(positions=64), {"pos_embed": (1, 4095, 144)}, "table of 4095 positions is not square"),
        (tiny.pixart_shapes(positions=16), {}, "for less than 512 pixels, which ComfyUI has no positions for"),
    ],
)
def test_sizes_that_contradict(shapes, change, says):
    infos = header(shapes | change)
    family, _ = detect(infos)
    with pytest.raises(ValueError, match=says):
        family.config(infos)


def test_a_family_of_the_wrong_checkpoint():
    with pytest.raises(ValueError, match=r"this is no Flux\.1 checkpoint: it has no img_in\.weight"):
        comfy_layout(FLUX, header(tiny.sd3_shapes()))
