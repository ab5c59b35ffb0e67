"""Slice maps: against diffusers' own converters, and as algebra."""

import diffusers.loaders.single_file_utils as single_file
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit.models.flux import FLUX
from comfy_xdit.models.pixart import PIXART
from comfy_xdit.models.sd3 import SD3
from comfy_xdit.weights.slices import (
    Shape,
    Share,
    block_numbers,
    by_source,
    fused,
    is_unused,
    respelled,
    slice_map,
    stacked,
    swapped,
    whole,
)

# diffusers' converter for Flux takes 3072 for granted; one column is enough to tell rows apart.
FLUX_SHAPES = {
    "dev": tiny.flux_shapes(heads=24, head_dim=128),
    "schnell": tiny.flux_shapes(heads=24, head_dim=128, guidance=False, depth=1, depth_single=3),
}
SD3_SHAPES = {
    "sd3": tiny.sd3_shapes(qk_norm=False, dual=()),
    "large": tiny.sd3_shapes(dual=(), depth=4, heads=3),
    "medium": tiny.sd3_shapes(dual=(0, 1)),
}
PIXART_SHAPES = {
    "sigma": tiny.pixart_shapes(null_tokens=None),
    "alpha": tiny.pixart_shapes(alpha=True, null_tokens=None),
}
CASES = [(FLUX, shapes) for shapes in FLUX_SHAPES.values()] + [
    (SD3, shapes) for shapes in SD3_SHAPES.values()
]
ALL = CASES + [(PIXART, shapes) for shapes in PIXART_SHAPES.values()]
CONVERT = {
    "flux": single_file.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": single_file.convert_sd3_transformer_checkpoint_to_diffusers,
}


def numbered(shapes):
    """Weights of one column whose every row has a number of its own."""
    weights, count = {}, 0
    for key, shape in shapes.items():
        kept = shape if key == "context_embedder.weight" else (shape[0], *[1] * (len(shape) - 1))
        rows = torch.arange(count, count + shape[0], dtype=torch.float64)
        weights[key] = rows.view(-1, *[1] * (len(shape) - 1)).expand(kept).clone()
        count += shape[0]
    return weights


@pytest.mark.parametrize(("family", "shapes"), CASES, ids=[*FLUX_SHAPES, *SD3_SHAPES])
def test_equals_diffusers_converter(family, shapes):
    weights = numbered(shapes)
    expected = CONVERT[family.name](dict(weights))
    slices = slice_map(family.table(weights), weights)
    assert slices.keys() == expected.keys()
    for target, pieces in slices.items():
        made = torch.cat([weights[piece.source].narrow(0, *piece[1:3]) for piece in pieces])
        assert torch.equal(made, expected[target]), target


@pytest.mark.parametrize(("family", "shapes"), ALL, ids=[*FLUX_SHAPES, *SD3_SHAPES, *PIXART_SHAPES])
def test_diffusers_layout_gives_comfyui_layout_back(family, shapes):
    infos = {key: Shape(shape) for key, shape in shapes.items()}
    slices = slice_map(family.table(infos), infos)
    own = {
        target: Shape((sum(piece.rows for piece in pieces), *shapes[pieces[0].source][1:]))
        for target, pieces in slices.items()
    }
    assert fused(family.table(own), own) == infos
    without = {key: info for key, info in own.items() if not key.endswith("0.attn.to_k.weight")}
    without.pop("transformer_blocks.0.attn2.to_k.weight", None)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn2?\.to_k\.weight is missing"):
        fused(family.table(own), without)
    with pytest.raises(ValueError, match=r"1 weights have no place in this model \(first: odd\.weight"):
        fused(family.table(own), own | {"odd.weight": Shape((3,))})


TABLES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=4).map(
    lambda lists: {
        f"stack.*.part{i}": tuple(Share(f"blocks.*.m{i}.n{j}", rows) for j, rows in enumerate(shares))
        for i, shares in enumerate(lists)
    }
)


@given(table=TABLES, unit=st.integers(1, 5), num_blocks=st.integers(1, 3), columns=st.integers(1, 4))
def test_slices_cover_every_row_once(table, unit, num_blocks, columns):
    infos = {
        name.replace("*", str(block)) + suffix: Shape((unit * sum(share.rows for share in shares), *rest))
        for name, shares in table.items()
        for block in range(num_blocks)
        for suffix, rest in ((".weight", (columns,)), (".bias", ()))
    }
    slices = slice_map(table, infos)
    for source, parts in by_source(slices).items():
        rows = [row for _, piece in parts for row in range(piece.source_row, piece.source_row + piece.rows)]
        assert rows == list(range(infos[source].shape[0]))
    for pieces in slices.values():
        rows = [row for piece in pieces for row in range(piece.target_row, piece.target_row + piece.rows)]
        assert rows == list(range(len(rows)))
    own = {
        target: Shape((pieces[0].rows, *infos[pieces[0].source].shape[1:]))
        for target, pieces in slices.items()
    }
    assert fused(table, own) == infos


def test_names():
    table = {
        "a": whole("t"),
        "b.*.x": stacked("q.*", "k.*"),
        "b.1.x": swapped("s.1"),
        "b.*.n_norm.scale": whole("n.*.w"),
    }
    infos = {"a.bias": Shape((3,)), "b.0.x.weight": Shape((4, 2)), "b.1.x.weight": Shape((4, 2))}
    slices = slice_map(table, infos | {"b.0.n_norm.weight": Shape((5,)), "b.1.n_norm.scale": Shape((5,))})
    assert slices.keys() == {"t.bias", "q.0.weight", "k.0.weight", "s.1.weight", "n.0.w", "n.1.w"}
    assert [piece[1:] for piece in slices["s.1.weight"]] == [(2, 2, 0), (0, 2, 2)]
    assert slices["k.0.weight"] == [("b.0.x.weight", 2, 2, 0)]
    with pytest.raises(ValueError, match=r"the 5 rows of b\.0\.x\.weight do not divide"):
        slice_map(table, {"b.0.x.weight": Shape((5, 2))})
    for key in ("c.weight", "b.x.weight", "b.0.y.weight"):
        with pytest.raises(ValueError, match="have no place in this model"):
            slice_map(table, {key: Shape((4, 2))})


def test_weights_that_no_model_uses():
    table = {"a": whole("t"), "table": (), "text.none": (), "t.table": ()}
    infos = {"a.bias": Shape((3,)), "table": Shape((1, 9, 4)), "text.none": Shape((0,))}
    assert slice_map(table, infos).keys() == {"t.bias"}
    assert fused(table, {"t.bias": Shape((3,)), "t.table": Shape(())}) == {"a.bias": Shape((3,))}
    assert [is_unused(table, key) for key in ("table", "a.bias", "odd")] == [True, False, False]


def test_block_numbers():
    assert block_numbers(
        {"b.0.x": 0, "b.10.x": 0, **{f"b.{i}.y": 0 for i in range(10)}, "c.77.x": 0}, "b"
    ) == [*range(11)]
    assert block_numbers({"a.x": 0}, "b") == []
    with pytest.raises(ValueError, match=r"b\.1 is missing"):
        block_numbers({"b.0.x": 0, "b.2.x": 0}, "b")


def test_respelled():
    assert respelled("d.0.query_norm.scale") == "d.0.query_norm.weight"
    assert respelled(respelled("d.0.key_norm.weight")) == "d.0.key_norm.weight"
    assert respelled("img_in.weight") == "img_in.weight"
