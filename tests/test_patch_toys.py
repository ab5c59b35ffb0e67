"""PipeFusion's patches on any module with a plan: what an emulation on whole tensors gives, whatever the stages are."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from staged_toys import PLANS, arguments, on_stage, stageable

from comfy_xdit.parallel.latent_tokens import Grid, LatentTokens
from comfy_xdit.parallel.patch_tokens import PatchTokens

NUM = 3
"""Evaluations, each of other numbers."""

PLAIN = F.scaled_dot_product_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """A toy, how many patches there are, and where the latent's tokens stand in its streams.

    least: so many tokens of each stream are computed in each patch.
    """

    toy: str
    num: int
    latent: LatentTokens
    sizes: dict = dataclasses.field(default_factory=dict)
    least: int = 1

    def rows(self, number):
        """Of the latent's tokens, in a patch."""
        return torch.arange(self.latent.grid.rows).tensor_split(self.num)[number].tolist()

    def streams(self):
        """How many tokens each stream has."""
        if self.toy == "joint":
            return {"text": self.sizes.get("text", 5), "image": 11}
        if self.toy == "pair":
            return {"video": 12, "audio": self.sizes.get("audio", 7)}
        return {"all": 9 * self.sizes.get("height", 2)}

    def tokens(self, number):
        """Stream → those that a patch computes."""
        latent, grid, found = self.latent, self.latent.grid, {}
        for stream, length in self.streams().items():
            everything = torch.arange(length)
            parts = [everything]
            if stream == latent.stream:
                end = latent.first + grid.frames * grid.rows * grid.columns
                shape = (grid.frames, grid.rows, grid.columns)
                own = everything[latent.first : end].view(shape)[:, self.rows(number)].flatten()
                before, after = everything[: latent.first], everything[end:]
                parts = [before.tensor_split(self.num)[number], own, after.tensor_split(self.num)[number]]
            else:
                parts = [everything.tensor_split(self.num)[number]]
                if length < self.num * self.least:  # some are computed again
                    least = min(self.least, length)
                    parts = [everything[number * (length - least) // max(self.num - 1, 1) :][:least]]
            found[stream] = torch.cat(parts)
        return found


def standing(stream, rows, columns, *, frames=1, first=0):
    return LatentTokens(stream=stream, first=first, grid=Grid(frames=frames, rows=rows, columns=columns, side=1))


IMAGE = standing("image", 4, 2)
CASES = {
    "references after the image": Case("joint", 3, IMAGE),
    "masked": Case("joint", 2, IMAGE, {"masked": True}),
    "a text shorter than patches": Case("joint", 4, IMAGE, {"text": 2}),
    "a text of one token": Case("joint", 2, IMAGE, {"text": 1}),
    "one patch": Case("joint", 1, IMAGE),
    "tokens before the latent's": Case("joint", 2, standing("image", 4, 2, first=3)),
    "frames, two streams": Case("pair", 2, standing("video", 3, 2, frames=2)),
    "no audio": Case("pair", 3, standing("video", 3, 2, frames=2), {"audio": 0}),
    "a grid": Case("line", 3, standing("all", 3, 3, frames=3), {"height": 3}),
}


BESIDE = ["masked", "a text shorter than patches", "a text of one token", "frames, two streams", "no audio", "a grid"]


def run_patches(name, degrees, ends):
    """Job: what the toy gives in each evaluation, put together from patches on the last stage (None elsewhere)."""
    from comfy_xdit.parallel.stale import StaleAttention

    case = CASES[name]
    model, outs = stageable(case.toy, torch.float64), []
    with on_stage(model, PLANS[case.toy], degrees, ends, StaleAttention) as (work, stage, _):
        keys = work.method
        for number in range(NUM):
            keys.begin("run", keep=number + 1 < NUM, first=0, num_rows=2)
            named = arguments(case.toy, seed=number, **case.sizes)

            def forward(named=named):
                return stage.forward(lambda: model(**named, options={"override": work.attend}))

            if number == 0:
                work.patch = None
                outs.append(forward())
                continue
            made = []
            for patch in range(case.num):
                rows = case.rows(patch)
                rows = range(rows[0], rows[-1] + 1)
                work.patch = PatchTokens(number=patch, num=case.num, rows=rows, latent=case.latent)
                made.append(forward())
            outs.append(None if made[0] is None else put_together(case, made))
            stage.settle()
        stage.settle()
    return outs


def put_together(case, made):
    """Of each patch's output the tokens that it computed."""
    whole = torch.full_like(made[0], torch.nan)
    for patch, out in enumerate(made):
        at = places(case, patch, out)
        flat = out.flatten(1, -2)
        whole.view(flat.shape)[:, at] = flat[:, at]
    return whole


def places(case, patch, out):
    """Where a patch's tokens stand in the toy's output."""
    tokens, offset, found = case.tokens(patch), 0, []
    for stream, length in case.streams().items():
        if stream != "text":
            found.append(tokens[stream] + offset)
            offset += length
    at = torch.cat(found)
    return at[at < out.shape[1:-1].numel()]  # references are cut off


class Emulation:
    """torch's attention on whole tensors: keys of the patch's tokens are new, all others as they were kept.

    Queries of other tokens are computed too, and are of no matter.
    """

    def __init__(self, streams):
        self.streams = streams
        self.kept, self.tokens, self.call = {}, None, 0

    def begin(self, tokens):
        """A forward begins, of these tokens of each stream; None: of all."""
        self.tokens, self.call = tokens, 0

    def __call__(self, query, key, value, attn_mask=None, scale=None):
        number, self.call = self.call, self.call + 1
        if self.tokens is None:
            self.kept[number] = key.clone(), value.clone()
        else:
            own, offset = [], 0
            for stream in self._held(key.shape[2]):
                own.append(self.tokens[stream] + offset)
                offset += self.streams[stream]
            for old, new in zip(self.kept[number], (key, value), strict=True):
                old[:, :, torch.cat(own)] = new[:, :, torch.cat(own)]
        return PLAIN(query, *self.kept[number], attn_mask=attn_mask, scale=scale)

    def _held(self, length):
        alone = [stream for stream, size in self.streams.items() if size == length]
        return alone or list(self.streams)


def emulated(case):
    attend, model, outs = Emulation(case.streams()), stageable(case.toy, torch.float64), []
    with torch.inference_mode(), mock.patch.object(F, "scaled_dot_product_attention", attend):
        for number in range(NUM):
            made = []
            for patch in range(case.num) if number else [None]:
                attend.begin(None if patch is None else case.tokens(patch))
                made.append(model(**arguments(case.toy, seed=number, **case.sizes)))
            outs.append(put_together(case, made) if number else made[0])
    return outs


def exact(case):
    model = stageable(case.toy, torch.float64)
    with torch.inference_mode():
        return [model(**arguments(case.toy, seed=number, **case.sizes)) for number in range(NUM)]


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def ranks():
    with Ranks(1) as one, Ranks(2) as two, Ranks(3) as three, Ranks(4) as four:
        yield {1: one, 2: two, 3: three, 4: four}


def asked(ranks, case, degrees, ends):
    named = {"name": case, "degrees": {"pipe": len(ends), **degrees}, "ends": ends}
    num = math.prod((len(ends), *degrees.values()))
    answers = ranks[num].run("run_of", module="test_patch_toys", function="run_patches", arguments=named)
    in_stage = num // len(ends)
    assert all(out is None for outs in answers[:-in_stage] for out in outs)
    return answers[-in_stage:]


ENDS = {"joint": [(4,), (2, 4), (1, 3, 4)], "pair": [(3,), (1, 3), (1, 2, 3)], "line": [(3,), (2, 3), (1, 2, 3)]}


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_patches_equal_the_emulation(ranks, case, num_stages):
    """Whatever the number of stages; and old keys do change what comes, but for a single patch."""
    expected, fresh = emulated(CASES[case]), exact(CASES[case])
    (outs,) = asked(ranks, case, {}, ENDS[CASES[case].toy][num_stages - 1])
    assert max(map(error, outs, expected)) <= 1e-12
    drifts = list(map(error, outs, fresh))
    assert drifts[0] <= 1e-12
    assert max(drifts) <= 1e-12 if CASES[case].num == 1 else min(drifts[1:]) > 1e-3


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}], ids=["ulysses", "ring"])
@pytest.mark.parametrize("case", BESIDE)
def test_patches_beside_other_methods(ranks, case, degrees):
    """Both ranks have a token of each stream in each patch; but where a text has one alone, nothing is cut."""
    is_cut = 1 not in CASES[case].streams().values()
    expected = emulated(dataclasses.replace(CASES[case], least=2 if is_cut else 1))
    for outs in asked(ranks, case, degrees, ENDS[CASES[case].toy][1]):
        assert max(map(error, outs, expected)) <= 1e-12
