"""How rows are dealt to ranks, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import refusal_of, tiny_call

from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.denoise import Piece, deal
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.rows import rows_of
from comfy_xdit.parallel.spec import ParallelSpec


@given(batches=st.lists(st.integers(1, 9), min_size=1, max_size=4), cfg=st.integers(1, 2), dp=st.integers(1, 5))
def test_every_row_is_dealt_once(batches: list[int], cfg: int, dp: int) -> None:
    lanes = deal(batches, cfg=cfg, dp=dp)
    dealt = [(p.call, row) for lane in lanes for p in lane for row in range(p.start, p.stop)]
    assert sorted(dealt) == [(call, row) for call, batch in enumerate(batches) for row in range(batch)]
    loads = [sum(piece.stop - piece.start for piece in lane) for lane in lanes]
    assert max(loads) - min(loads) <= 2
    assert lanes[0][0].start == lanes[0][0].call == 0


def test_cond_and_uncond_go_to_different_cfg_ranks() -> None:
    assert deal([4], cfg=2, dp=1) == [[Piece(call=0, start=0, stop=2)], [Piece(call=0, start=2, stop=4)]]
    assert deal([1, 1], cfg=2, dp=1) == [[Piece(call=0, start=0, stop=1)], [Piece(call=1, start=0, stop=1)]]
    # dp outermost: lanes 0 and 1 are dp row 0, for cond and uncond.
    assert deal([4], cfg=2, dp=2) == [[Piece(call=0, start=n, stop=n + 1)] for n in (0, 2, 1, 3)]


def test_a_lane_may_be_idle() -> None:
    assert deal([1], cfg=2, dp=2) == [[Piece(call=0, start=0, stop=1)], [], [], []]


def test_rows_of_nested_values() -> None:
    call = {"x": torch.arange(3), "one": torch.zeros(1, 2), "list": [torch.arange(3)], "method": "index"}
    cut = rows_of(call, range(1, 3))
    assert cut["x"].tolist() == cut["list"][0].tolist() == [1, 2]
    assert cut["one"].shape == (1, 2) and cut["method"] == "index"
    with pytest.raises(ValueError, match="a tensor of 2 rows cannot go with a batch of 3; use 1 or 3"):
        rows_of({**call, "y": torch.zeros(2)}, range(1))


@pytest.mark.parametrize(
    ("family", "change", "chunks", "sentence"),
    [
        ("flux", {}, 2, "a batch of 3 is not made of 2 equal chunks; send whole chunks"),
        ("flux", {"guidance": None}, 1, "needs a guidance value"),
        ("flux", {"control": {}}, 1, "takes no ControlNet yet"),
        ("flux", {"ref_latents_method": "index_timestep_zero"}, 1, "use offset, index or uxo/uno"),
        ("flux", {"ref_latents": [torch.zeros(1, 7, 8, 8)]}, 1, "latent of shape [1, 7, 8, 8] does not fit"),
        ("sd3", {"y": None}, 1, "SD3 / SD3.5 needs pooled text"),
        ("sd3", {"x": torch.zeros(3, 4, 26, 8)}, 1, "use 24 or less on each side (192 pixels)"),
        ("pixart", {"x": torch.zeros(3, 4, 33, 40)}, 1, "a latent of 40x33 does not divide into PixArt's patches"),
        ("pixart", {"x": torch.zeros(3, 4, 32, 32)}, 1, "use 528 pixels or more, both sides together"),
        ("pixart", {"x": torch.zeros(3, 16, 64, 64)}, 1, "a latent of 16 channels does not fit this PixArt"),
        ("pixart", {"context": torch.zeros(3, 2, 9)}, 1, "text of 9 channels does not fit this PixArt"),
        ("pixart", {"control": {}}, 1, "takes no ControlNet yet"),
    ],
)
def test_refusals(family: str, change: dict, chunks: int, sentence: str) -> None:
    call = {**tiny_call(family, seed=0, batch=3, size=(4, 4), text=3), **change}
    refusal = refusal_of(model={"family": family, "heads": 4}, calls=[call], chunks=[chunks], degrees={})
    assert sentence in refusal


def test_a_spec_for_another_number_of_ranks() -> None:
    with pytest.raises(ValueError, match="ulysses=2 does not fit a pool of 1; use degrees whose product is 1"):
        ParallelContext(ParallelSpec(ulysses=2), GroupCache(1))
