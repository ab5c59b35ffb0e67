"""Drafted plans, of toys with the signatures of ComfyUI's transformers, which join text and image in either order."""

import pytest
import torch
from token_toys import HEADS, WIDTH, torchs
from torch import nn

from comfy_xdit.errors import InputError
from comfy_xdit.native import selftest as trials
from comfy_xdit.native.drafting import written
from comfy_xdit.native.drafting.grow import growths
from comfy_xdit.native.drafting.written import draft
from comfy_xdit.native.selftest import selftest
from comfy_xdit.native.subject import Subject, padded, rand, times
from comfy_xdit.parallel.tokens import Attention, Blocks, Index, TokenPlan, Tokens


class Attend(nn.Module):
    """Torch's attention, by the caller's override where there is one."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv = HEADS, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, transformer_options, pe=None, mask=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q if pe is None else q * pe
        override = transformer_options.get("optimized_attention_override")
        return override(torchs, q, k, v, HEADS, mask=mask) if override else torchs(q, k, v, HEADS, mask=mask)


class Double(nn.Module):
    def __init__(self, image_first):
        super().__init__()
        self.attn, self.image_first = Attend(), image_first

    def forward(self, img, txt, pe, txt_mask=None, num_new=None, transformer_options=None):
        both = (img, txt) if self.image_first else (txt, img)
        mask = None
        if txt_mask is not None:
            seen = torch.zeros(img.shape[0], 1, img.shape[1]), (txt_mask.float()[:, None] - 1) * 1e9
            mask = torch.cat(seen if self.image_first else seen[::-1], -1)[:, None]
        out = self.attn(torch.cat(both, 1), transformer_options, pe, mask)
        first, second = out.split([one.shape[1] for one in both], 1)
        if num_new is not None:
            img = torch.cat([img[:, :num_new], img[:, num_new:] * 0.5], 1)
        return (img + (first if self.image_first else second), txt + (second if self.image_first else first))


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.scale = Attend(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, pe, transformer_options=None):
        return x + self.attn(self.scale(x), transformer_options, pe)


class Toy(nn.Module):
    """Text and image that attend together, then as one sequence; places are known by their number."""

    def __init__(self, image_first):
        super().__init__()
        self.image_first = image_first
        self.double_blocks = nn.ModuleList(Double(image_first) for _ in range(2))
        self.single_blocks = nn.ModuleList(Single() for _ in range(2))
        self.into, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x, timestep, context, attention_mask=None, num_new=None, transformer_options=None):
        img = self.into(x.flatten(2).transpose(1, 2)) * timestep[:, None, None]
        pe = torch.linspace(0.5, 1.5, img.shape[1] + context.shape[1])[None, :, None]
        txt, options = context, transformer_options
        for block in self.double_blocks:
            img, txt = block(img, txt, pe, txt_mask=attention_mask, num_new=num_new, transformer_options=options)
        both = (img, txt) if self.image_first else (txt, img)
        joined = torch.cat(both, 1)
        for block in self.single_blocks:
            joined = block(joined, pe, transformer_options=options)
        start = 0 if self.image_first else txt.shape[1]
        out = self.out(joined[:, start : start + img.shape[1]])
        return out.transpose(1, 2).reshape(x.shape)


def calls(config):
    one = {"x": rand(1, 4, 5, 7), "timestep": times(0.7), "context": rand(1, 9, WIDTH)}
    two = {"x": rand(2, 4, 5, 7), "timestep": times(0.7, 0.3), "context": rand(2, 9, WIDTH)}
    return {"text": one, "padded": {**two, "attention_mask": padded(2, 9)}, "new": {**one, "num_new": 12}}


@pytest.fixture
def toys(monkeypatch):
    """`toys(image_first)`: the subject of one."""

    def build(kind, config):
        torch.manual_seed(0)
        return Toy(**config).eval().requires_grad_(False)

    monkeypatch.setattr(trials, "exists", lambda kind: True)
    monkeypatch.setattr(trials, "build", build)
    monkeypatch.setattr(written, "build", build)
    return lambda image_first: Subject(kind="Toy", config={"image_first": image_first}, small=(), calls=calls)


def plan(order):
    places = Tokens(order)
    double = {"img": Tokens(("image",)), "txt": Tokens(("text",)), "pe": places, "txt_mask": Tokens(("text",))}
    return TokenPlan(
        blocks=(
            Blocks(path="double_blocks", takes={**double, "num_new": Index(("image",))}, gives=("img", "txt")),
            Blocks(path="single_blocks", takes={"x": Tokens(order), "pe": places}, gives=("x",)),
        ),
        attention={
            "double_blocks.*.attn": Attention(order, mask="own"),
            "single_blocks.*.attn": Attention(order),
        },
    )


@pytest.mark.parametrize("image_first", [True, False])
def test_a_draft_holds(image_first, toys):
    subject = toys(image_first)
    # A place in the tokens shows only where it moves with them: what doesn't is left to a person.
    made = draft("toy-1", [subject])
    expected = plan(("image", "text") if image_first else ("text", "image"))
    takes = {name: rule for name, rule in expected.blocks[0].takes.items() if name != "num_new"}
    assert made.family.plan.attention == expected.attention
    assert {blocks.path: (blocks.takes, blocks.gives) for blocks in made.family.plan.blocks} == {
        "double_blocks": (takes, ("img", "txt")),
        "single_blocks": (expected.blocks[1].takes, ("x",)),
    }
    failed = [outcome.call for outcome in selftest(made.family, [subject]) if not outcome.holds]
    assert failed == ["Toy new on ulysses=2", "Toy new on ring=3"], "the self-test names what the draft lacks"


def test_the_file_says_the_same_family(toys):
    made = draft("toy-1", [toys(True)])
    namespace = {}
    exec(compile(made.text, "toy.py", "exec"), namespace)
    family = namespace["TOY_1"]
    for name in ("name", "kinds", "plan", "rows", "constants", "options"):
        assert getattr(family, name) == getattr(made.family, name), name
    assert family.rows == ("context", "attention_mask") and family.constants == ("num_new",)
    assert family.num_heads(Toy(True)) == HEADS and "double_blocks[0].attn.num_heads" in made.text


def test_what_has_no_such_blocks_is_refused(toys, monkeypatch):
    class Bare(Toy):
        def forward(self, x, timestep, transformer_options=None, **named):
            return 2 * x

    monkeypatch.setattr(written, "build", lambda kind, config: Bare(True))
    with pytest.raises(InputError, match="no list of blocks with attention grows with the image"):
        draft("toy", [toys(True)])


def test_growths():
    call = {"x": [torch.zeros(1, 4, 3, 5, 7), torch.zeros(1, 8, 11, 16)], "timestep": torch.zeros(1, 3)}
    call |= {"context": torch.zeros(1, 9, 6), "attention_mask": torch.zeros(1, 9)}
    call |= {"denoise_mask": torch.zeros(1, 1, 3, 5, 7)}
    found = list(growths(call))
    assert [stream for stream, _ in found] == ["image", "image", "image", "audio", "audio", "text"]
    frames, text = found[0][1], found[-1][1]
    assert frames["x"][0].shape[2] == frames["denoise_mask"].shape[2] == frames["timestep"].shape[1] == 4
    assert text["context"].shape[1] == text["attention_mask"].shape[1] > 9 and text["x"] is call["x"]
