"""Tensor parallel by a plan: ranks with parts of the weights equal one with all; a plan that lacks a line does not."""

import copy
import dataclasses

import pytest
import torch
from token_toys import torchs
from torch import nn

from comfy_xdit.errors import InputError
from comfy_xdit.parallel.cut import cut
from comfy_xdit.parallel.paths import find
from comfy_xdit.parallel.spec import ParallelSpec, WeightShare
from comfy_xdit.parallel.tensor import common_divisor, keep_own_shards, shards
from comfy_xdit.parallel.tensor_plan import TensorPlan
from comfy_xdit.parallel.thread_ranks import on_threads
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

HEADS, KEY_HEADS, DIM, MLP = 8, 4, 4, 24
WIDTH = HEADS * DIM


class Attend(nn.Module):
    """Fewer heads of keys; norms over all heads; positions for each head; a gate for each channel."""

    def __init__(self):
        super().__init__()
        self.heads, self.key_heads = HEADS, KEY_HEADS
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * DIM)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH, eps=1e-3), nn.RMSNorm(KEY_HEADS * DIM, eps=1e-3)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, pe, options):
        q, k, v = self.qkv(x).split([num * DIM for num in (self.heads, self.key_heads, self.key_heads)], -1)
        q, k = self.norm_q(q).unflatten(-1, (self.heads, DIM)), self.norm_k(k).unflatten(-1, (self.key_heads, DIM))
        q = (q * pe[0] + (1 if pe[1] else 0)).transpose(1, 2)
        k, v = (each.repeat_interleave(self.heads // self.key_heads, 2).transpose(1, 2)
                for each in (k, v.unflatten(-1, (self.key_heads, DIM))))
        attend = options.get("optimized_attention_override") or (lambda func, *args, **named: func(*args, **named))
        return self.out(attend(torchs, q, k, v, self.heads, skip_reshape=True) * self.gate(x).sigmoid())


class Block(nn.Module):
    """A modulation, attention, and an MLP whose halves are multiplied with each other beside what goes past it."""

    def __init__(self):
        super().__init__()
        self.width, self.hidden = WIDTH, MLP
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.attn = Attend()
        self.up, self.down = nn.Linear(WIDTH, WIDTH + 2 * MLP), nn.Linear(WIDTH + MLP, WIDTH)

    def forward(self, x, vec, pe, options):
        scale, shift = self.modulation(vec)[:, None].chunk(2, -1)
        x = x + self.attn(x * scale + shift, pe, options)
        plain, first, second = self.up(x).split([self.width, self.hidden, self.hidden], -1)
        return x + self.down(torch.cat([plain.tanh(), first.sigmoid() * second], -1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, vec, pe, transformer_options):
        for block in self.blocks:
            x = block(x, vec, (pe, True), transformer_options)
        return x


TENSOR = TensorPlan(
    columns=("blocks.*.attn.gate",),
    joined=("blocks.*.modulation.1", "blocks.*.modulation.0"),
    fused={
        "blocks.*.attn.qkv": ("heads", "key_heads", "key_heads"),
        "blocks.*.up": (WIDTH, MLP, MLP),
    },
    rows={"blocks.*.attn.out": (1,), "blocks.*.down": ("width", "hidden")},
    heads=("blocks.*.attn",),
    counts={"blocks.*.attn": ("key_heads",), "blocks.*": ("width", "hidden")},
    norms=("blocks.*.attn.norm_q", "blocks.*.attn.norm_k"),
    per_head={"blocks.*.attn": {"pe": 2}},
)
PLAN = TokenPlan(
    blocks=(Blocks(path="blocks", takes={"x": Tokens(("all",)), "pe": Tokens(("all",))}, gives=("x",)),),
    attention={"blocks.*.attn": Attention(("all",))},
    tensor=TENSOR,
)


def model(kind=Model):
    torch.manual_seed(0)
    made = kind().double().eval().requires_grad_(False)
    for norm in (child for name in TENSOR.norms for _, child in find(made, name)):
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    return made


def call():
    generator = torch.Generator().manual_seed(1)
    x, vec, pe = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                  for shape in ((2, 7, WIDTH), (2, WIDTH), (1, 7, HEADS, DIM)))
    return {"x": x, "vec": vec, "pe": pe}


def computed(plan, **degrees):
    """Every rank's output, and the part of the numbers of the weights that it holds."""

    # Not made on the ranks: threads have one source of random numbers.
    original = model()

    def on_rank(context):
        made, share = copy.deepcopy(original), context.spec.weights_of(context.rank)
        whole = sum(weight.numel() for weight in made.parameters())
        if share.num_shards > 1:
            keep_own_shards(made, plan.tensor, share)
        with torch.inference_mode(), cut(made, plan, context):
            out = made(**call(), transformer_options={})
        assert made.blocks[0].attn.norm_q.forward.__func__ is nn.RMSNorm.forward, "nothing is left behind"
        return out, sum(weight.numel() for weight in made.parameters()) / whole

    return on_threads(ParallelSpec(**degrees), on_rank)


def sent_by(context, plan, original):
    """What a rank sends in one forward, by collective."""
    made, share = copy.deepcopy(original), context.spec.weights_of(context.rank)
    if share.num_shards > 1:
        keep_own_shards(made, plan.tensor, share)
    with torch.inference_mode(), cut(made, plan, context):
        made(**call(), transformer_options={})
    return +context.traffic.bytes


SPECS = [{"tensor": 2}, {"tensor": 4}, {"tensor": 2, "ulysses": 2}, {"tensor": 2, "ring": 3}]


@pytest.mark.parametrize("degrees", SPECS, ids=str)
def test_ranks_with_parts_equal_one(degrees):
    expected = model()(**call(), transformer_options={})
    for out, share in computed(PLAN, **degrees):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert share == pytest.approx(1 / degrees["tensor"], abs=0.02), "the first rank alone has the biases of sums"


def damaged():
    """(what, the plan without it)."""
    for field in dataclasses.fields(TensorPlan):
        lines = getattr(TENSOR, field.name)
        for line in lines:
            rest = (
                {name: lines[name] for name in lines if name != line}
                if isinstance(lines, dict)
                else tuple(name for name in lines if name != line)
            )
            yield f"{field.name} {line}", dataclasses.replace(TENSOR, **{field.name: rest})
    yield "fused in two", dataclasses.replace(TENSOR, fused={**TENSOR.fused, "blocks.*.up": (WIDTH, 2 * MLP)})
    yield "rows in one", dataclasses.replace(TENSOR, rows={**TENSOR.rows, "blocks.*.down": (1,)})
    yield "another count", dataclasses.replace(TENSOR, counts={**TENSOR.counts, "blocks.*": ("width",)})


def test_a_plan_that_lacks_a_line_gives_another_result_or_none():
    expected, right = model()(**call(), transformer_options={}), []
    for what, tensor in damaged():
        try:
            outs = computed(dataclasses.replace(PLAN, tensor=tensor), tensor=2)
        except Exception:
            continue
        if all((out - expected).abs().max() < 1e-6 for out, _ in outs):
            right.append(what)
    # What is whole on every rank is right, too; and an activation has no weights.
    assert right == ["joined blocks.*.modulation.1", "joined blocks.*.modulation.0"]


def test_the_degrees_that_there_are():
    assert common_divisor(model(), TENSOR) == 4
    with pytest.raises(InputError, match=r"tensor=3 cannot cut the \d+ channels of blocks"):
        shards(model(), TENSOR, WeightShare(num_shards=3))
    other = dataclasses.replace(TENSOR, fused={"blocks.*.attn.qkv": (3, 2, 2)})
    with pytest.raises(ValueError, match="the plan is for another version"):
        common_divisor(model(), other)
