"""Toy modules that pass tokens around as video and image models do, their plans, and the job that runs them."""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from comfy_xdit.parallel.tokens import Attention, Blocks, Index, Ranges, Refused, TokenPlan, Tokens

HEADS, DIM = 6, 4
WIDTH = HEADS * DIM


def torchs(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **more):
    """Attention with an override's shapes, on one rank."""
    if not skip_reshape:
        q, k, v = (x.reshape(*x.shape[:2], -1, DIM).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=more.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Attend(nn.Module):
    """Queries of `x`, keys of `of`; fewer heads of keys than of queries where `groups` is more than 1."""

    def __init__(self, groups=1, seam="override"):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH // groups)
        self.seam = seam

    def forward(self, x, of=None, pe=None, mask=None, options=None):
        q, (k, v) = self.q(x), self.kv(x if of is None else of).chunk(2, -1)
        q = q if pe is None else q * pe
        v = v.unflatten(-1, (-1, DIM))  # as some models give it
        override = (options or {}).get("override")
        if self.seam == "override" and override:
            return override(torchs, q, k, v, HEADS, mask=mask, attn_precision=None)
        return torchs(q, k, v, HEADS, mask=mask)


def per_range(x, ranges):
    """Each range of the tokens times its own number."""
    out = x.clone()
    for first, end, number in ranges:
        out[:, first:end] *= number
    return out


class Double(nn.Module):
    """Text and image, that attend together; the image's modulation is by ranges."""

    def __init__(self):
        super().__init__()
        self.attn = Attend(groups=2)
        self.text, self.image = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, img, txt, pe, mask=None, ranges=None, options=None):
        out = self.attn(torch.cat([txt, img], 1), None, pe, mask, options=options)
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]
        img += per_range(self.image(img_out), ranges)
        return img, txt + self.text(txt_out)


class Single(nn.Module):
    """One sequence of both; the tokens before `place` are of another kind; attends twice, and takes further names."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleList([Attend(seam="sdpa")])
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, pe, place, **further):
        x = x + self.attn[0](x, None, pe) * further["gain"]
        kinds = torch.where(torch.arange(x.shape[1], device=x.device) < place, 0.5, 2.0).to(x.dtype)
        return x + self.out(x).tanh() * kinds[:, None]


class Joint(nn.Module):
    """Two lists of blocks, one after the other; residuals between the blocks; reference tokens that end up cut off."""

    def __init__(self):
        super().__init__()
        self.doubles = nn.ModuleList([Double(), Double()])
        self.singles = nn.ModuleList([Single(), Single()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, img, txt, pe, gain, residual, num_kept, mask=None, options=None):
        img, num_text = img.clone(), txt.shape[1]
        ranges = [(0, num_kept, 0.7), (num_kept, None, 1.6)]
        for block in self.doubles:
            img, txt = block(img, txt, pe=pe, mask=mask, ranges=ranges, options=options)
            img[:, :num_kept] += residual
        x = torch.cat([txt, img], 1)
        for block in self.singles:
            x = block(x, pe, num_text + num_kept, gain=gain)
            x[:, num_text : num_text + num_kept] += residual
        return self.head(x[:, num_text:][:, :num_kept])


BOTH = ("text", "image")
JOINT = TokenPlan(
    blocks=(
        Blocks(
            path="doubles",
            takes={
                "img": Tokens(("image",)),
                "txt": Tokens(("text",)),
                "pe": Tokens(BOTH),
                "ranges": Ranges(("image",)),
            },
            gives=("img", "txt"),
        ),
        Blocks(
            path="singles",
            takes={"x": Tokens(BOTH), "pe": Tokens(BOTH), "place": Index(BOTH), "gain": Tokens(BOTH)},
            gives=("x",),
        ),
    ),
    attention={"doubles.*.attn": Attention(BOTH), "singles.*.attn.0": Attention(BOTH, seam="sdpa")},
)


class Compressed:
    """A number for each run of `num` tokens."""

    def __init__(self, x, num):
        self.x, self.num = x, num or 1

    def expand(self):
        return self.x.repeat_interleave(self.num, 1)


class AudioVideo(nn.Module):
    """A pair of streams; each attends to itself and to the other, with a mask made of what the block holds.

    strength: the model reads it. more: further outputs.
    """

    def __init__(self):
        super().__init__()
        self.own, self.audio_own, self.video, self.audio = (Attend() for _ in range(4))
        self.strength, self.more = 0.7, ("more",)

    def forward(self, x, steps=None, seen=None, guide=None, options=None):
        video, audio = x
        frames = steps[0].repeat_interleave(video.shape[1] // steps[0].shape[1], 1) + steps[1] * steps[2].expand()
        mask = None if seen is None else seen.bool()[:, None, None]
        video = video + self.own(video * frames, options=options)
        if not audio.shape[1]:
            return video, audio, *self.more
        audio = audio + self.audio_own(audio, mask=mask, options=options)
        v, a = self.video(video, audio, mask=mask, options=options), self.audio(audio, video, options=options)
        return video + v, audio + a, *self.more


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([AudioVideo(), AudioVideo(), AudioVideo()])

    def forward(self, x, steps, seen=None, guide=None, options=None):
        for block in self.blocks:
            video, audio, *more = block(x, steps, seen=seen, guide=guide, options=options)
            assert tuple(more) == block.more
            x = [video * block.strength, audio]
        return torch.cat(x, 1)


VIDEO, AUDIO = ("video",), ("audio",)
PAIR = TokenPlan(
    blocks=(
        Blocks(
            path="blocks",
            takes={
                "x.0": Tokens(VIDEO),
                "x.1": Tokens(AUDIO),
                "steps": Tokens(VIDEO, spread=True, expands=True),
                "seen": Tokens(AUDIO),
                "guide": Refused("guides are not for several GPUs; take them off"),
            },
            gives=("x.0", "x.1"),
        ),
    ),
    attention={
        "blocks.*.own": Attention(VIDEO),
        "blocks.*.audio_own": Attention(AUDIO, mask="own"),
        "blocks.*.video": Attention(VIDEO, keys=AUDIO, mask="own"),
        "blocks.*.audio": Attention(AUDIO, keys=VIDEO),
    },
)


class Cube(nn.Module):
    """Tokens in T, H, W, that attend all together, `num` times; the block itself is the module that attends."""

    def __init__(self, num):
        super().__init__()
        self.inner, self.num = Attend(), num

    def forward(self, *args):
        x, pe, options = args
        for _ in range(self.num):
            out = self.inner(x.flatten(1, 3), None, pe.flatten(0, 2), options=options)
            x = x + out.view(x.shape)
        return x


class Grid(nn.Module):
    """A side list that runs once for each of two hints, the last time after the last block of the main list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Cube(2), Cube(1)])
        self.side = nn.ModuleList([Cube(2), Cube(2)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x, pe, options=None):
        for block, side in zip(self.blocks, self.side, strict=True):
            x = block(x, pe, options)
            for strength in (0.5, 2.0):
                x = x + (side(x, pe, options) - x) * strength
        x = self.head(x)
        return x - x.mean((1, 2, 3), keepdim=True)


ALL = ("all",)
GRID = TokenPlan(
    blocks=tuple(
        Blocks(
            path=path,
            takes={"args.0": Tokens(ALL, grid=3), "args.1": Tokens(ALL, dim=0, grid=3)},
            gives=("args.0",),
        )
        for path in ("blocks", "side")
    ),
    attention={"blocks.*": Attention(ALL, then=(ALL,), or_fewer=True), "side.*": Attention(ALL, then=(ALL,))},
    join={"head": {"input": Tokens(ALL, grid=3)}},
    in_order=False,
)

CALLED = dataclasses.replace(
    JOINT, attention={name: dataclasses.replace(rule, seam="torchs") for name, rule in JOINT.attention.items()}
)
"""The same, with the function that the toys' own module calls."""

TOYS = {"joint": (Joint, JOINT), "called": (Joint, CALLED), "pair": (Pair, PAIR), "grid": (Grid, GRID)}


def call(toy, *, seed=3, dtype=torch.float64, **sizes):
    """Random arguments of a toy's forward."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if toy == "grid":
        shape = (3, sizes.get("height", 2), 3)
        return {"x": random(2, *shape, WIDTH), "pe": random(*shape, WIDTH)}
    if toy == "pair":
        num, audio, batch = 12, sizes.get("audio", 7), 2
        steps = (random(batch, 4, WIDTH), random(batch, 1, WIDTH), Compressed(random(batch, 6, WIDTH), 2), True)
        seen = torch.arange(audio) % 3 != 1
        return {
            "x": [random(batch, num, WIDTH), random(batch, audio, WIDTH)],
            "steps": steps,
            "seen": seen.float().expand(batch, -1),
        }
    text, image, kept = sizes.get("text", 5), 11, 8
    mask = (torch.arange(text + image) % 4 != 1).expand(1, 1, text + image, -1)
    return {
        "img": random(2, image, WIDTH),
        "txt": random(2, text, WIDTH),
        "pe": random(1, text + image, WIDTH),
        "gain": random(2, text + image, 1),
        "residual": random(2, kept, WIDTH),
        "num_kept": kept,
        "mask": mask if sizes.get("masked") else None,
    }


def lines(toy):
    """(what, the plan without it) for each line of a toy's plan."""
    plan = TOYS[toy][1]
    for at, blocks in enumerate(plan.blocks):
        for name, rule in blocks.takes.items():
            takes = {other: what for other, what in blocks.takes.items() if other != name}

            def less(at=at, blocks=blocks, takes=takes):
                changed = dataclasses.replace(blocks, takes=takes)
                return dataclasses.replace(plan, blocks=(*plan.blocks[:at], changed, *plan.blocks[at + 1 :]))

            if not isinstance(rule, Refused):
                yield f"{blocks.path} {name}", less
        yield blocks.path, lambda at=at: dataclasses.replace(plan, blocks=plan.blocks[:at] + plan.blocks[at + 1 :])
    for name in plan.attention:
        rest = {other: rule for other, rule in plan.attention.items() if other != name}
        yield f"attention {name}", lambda rest=rest: dataclasses.replace(plan, attention=rest)
    if plan.join:
        yield "join", lambda: dataclasses.replace(plan, join={})


def toy_model(toy):
    """In fp64, in which a rounding is no excuse."""
    torch.manual_seed(0)
    return TOYS[toy][0]().double().eval().requires_grad_(False)


def compute(toy, plan, degrees, sizes, **more):
    """A toy's output on the ranks of `degrees`, twice; and how many bytes this rank sent."""
    from ranks import groups

    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.spec import ParallelSpec
    from comfy_xdit.parallel.whole_shaped import whole_shaped

    model = toy_model(toy)
    context = ParallelContext(ParallelSpec(**degrees), groups())
    with torch.inference_mode(), whole_shaped(model, plan, context) as work:
        outs = [model(**call(toy, **sizes), **more, options={"override": work.attend}) for _ in range(2)]
    return outs, sum(context.traffic.bytes.values())


def run_toy(toy, degrees, sizes, **more):
    """Job: `compute` with the toy's whole plan."""
    return compute(toy, TOYS[toy][1], degrees, sizes, **more)


def refusal(toy, degrees, sizes, plan=None, **more):
    """Job: what a run raises, with the toy's plan or another one."""
    try:
        compute(toy, plan or TOYS[toy][1], degrees, sizes, **more)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_damaged(toy, degrees, sizes):
    """Job: for each line of the plan the outputs without it, None where there was an error."""
    found = {}
    for what, damaged in lines(toy):
        found[what] = None
        with contextlib.suppress(Exception):
            found[what] = compute(toy, damaged(), degrees, sizes)[0][0]
    return found

