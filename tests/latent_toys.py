"""Toy transformers that take and give latents as ComfyUI's do, and what PipeFusion makes of them, on whole tensors."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from staged import inpainting
from token_toys import WIDTH, Attend
from torch import nn

from comfy_xdit.messages import Sample
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.latent_tokens import LatentTokens
from comfy_xdit.parallel.pipefusion import pipefusion
from comfy_xdit.parallel.spec import ModelShape, ParallelSpec
from comfy_xdit.parallel.stages import keep_stage
from comfy_xdit.parallel.thread_ranks import on_threads
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens
from comfy_xdit.trajectory import Replay

CHANNELS, TEXT = 3, 7
PLAIN = F.scaled_dot_product_attention


class Video(nn.Module):
    """The text stays as it is, and the tokens attend to it."""

    def __init__(self):
        super().__init__()
        self.own, self.cross = Attend(), Attend()

    def forward(self, x, text, time, options):
        x = x + self.own(x * time, options=options)
        return x + self.cross(x, of=text, options=options)


class Double(nn.Module):
    """Text and image side by side."""

    def __init__(self):
        super().__init__()
        self.own = Attend()

    def forward(self, text, x, time, options):
        out = self.own(torch.cat([text, x], 1) * time, options=options)
        return text + out[:, : text.shape[1]], x + out[:, text.shape[1] :]


class Joined(nn.Module):
    """Text and image in one sequence."""

    def __init__(self):
        super().__init__()
        self.own = Attend()

    def forward(self, x, time, options):
        return x + self.own(x * time, options=options)


class Toy(nn.Module):
    """A latent of any number of dims, in tokens of 2 by 2; an odd end is filled up from the other end, as in ComfyUI.

    adds_x: so much of the latent itself is added to the output, which no stage but the first may do.
    """

    def __init__(self, block, *, num_blocks=3, adds_x=0.0):
        super().__init__()
        self.kind, self.adds_x = block, adds_x
        self.embed, self.text, self.time = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(TEXT, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(num_blocks)])
        self.head = nn.Linear(WIDTH, 4 * CHANNELS)

    def forward(self, x, timestep, context, transformer_options, again=None):
        timestep = timestep if again is None else again
        options = {"override": transformer_options.get("optimized_attention_override")}
        rows, columns = x.shape[-2:]
        frames = x if x.ndim == 5 else x[:, :, None]
        frames = F.pad(frames, (0, columns % 2, 0, rows % 2, 0, 0), mode="circular")
        squares = frames.unflatten(-1, (-1, 2)).unflatten(3, (-1, 2))  # B C T h 2 w 2
        shape = squares.shape
        tokens = self.embed(squares.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
        text, time = self.text(context), self.time(timestep[:, None, None].to(x.dtype))
        out = self.head(self._through(tokens, text, time, options))
        out = out.view(shape[0], *(shape[dim] for dim in (2, 3, 5, 1, 4, 6))).permute(0, 4, 1, 2, 5, 3, 6)
        out = out.flatten(5).flatten(3, 4)[..., :rows, :columns].reshape(x.shape)
        return out + self.adds_x * x if self.adds_x else out

    def _through(self, x, text, time, options):
        if self.kind is Joined:
            num, x = text.shape[1], torch.cat([text, x], 1)
            for block in self.blocks:
                x = block(x, time, options)
            return x[:, num:]
        for block in self.blocks:
            if self.kind is Video:
                x = block(x, text, time, options)
            else:
                text, x = block(text, x, time, options)
        return x


def plan(gives, streams, **takes):
    blocks = Blocks(path="blocks", takes=takes, gives=gives)
    return TokenPlan(blocks=(blocks,), attention={"blocks.*.own": Attention(streams)})


PLANS = {
    Video: plan(("x",), ("video",), x=Tokens(("video",))),
    Double: plan(("text", "x"), ("text", "image"), text=Tokens(("text",)), x=Tokens(("image",))),
    Joined: plan(("x",), ("all",), x=Tokens(("all",))),
}
STREAMS = {Video: "video", Double: "image", Joined: "all"}


def latent(toy, call):
    first = call["context"].shape[1] if toy.kind is Joined else 0
    return LatentTokens.of(call["x"], STREAMS[toy.kind], side=2, first=first)


def family(block, **more):
    fields = {"name": "toy", "title": "Toy", "kinds": ("Toy",), "num_heads": lambda toy: 6, "plan": PLANS[block]}
    return ComfyFamily(**{**fields, "rows": ("context", "again"), "latent": latent, **more})


def toy_of(block, **options):
    """In fp64, in which a rounding is no excuse."""
    torch.manual_seed(0)
    return Toy(block, **options).double().eval().requires_grad_(False)


def model_of(block, stage=None, *, more=None, **options):
    """As a rank holds it. stage: its blocks; None for all. more: fields of the family."""
    module = toy_of(block, **options)
    if stage is not None:
        keep_stage(module, PLANS[block], stage)
    fields = {"compute_dtype": torch.float64, "num_channels": CHANNELS}
    shape = ModelShape(title="Toy", num_heads=6, num_blocks=3)
    return SimpleNamespace(family=family(block, **(more or {})), module=module, shape=shape, **fields)


def job_of(program, shape, *, texts=(5, 5), masked=False):
    """The fields of a `Sample`. The toy is given its timestep twice, under both names."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whole = (shape[0], CHANNELS, *shape[1:])
    conds = [{"context": random(shape[0], num, TEXT), "timesteps": ["again"]} for num in texts[: len(program.conds)]]
    mask = (random(*whole) > 0).double() if masked else None
    program = inpainting(program) if masked else program
    noises = [random(*whole) for _ in program.calls]
    return {
        "program": program, "conds": conds, "noise": random(*whole), "latent": random(*whole), "mask": mask,
        "noises": noises,
    }


ENDS = {1: (3,), 2: (1, 3), 3: (1, 2, 3)}
"""Of the stages' blocks."""


def sampled(block, job, degrees, run=pipefusion, *, more=None, toy=None, **method):
    """What each rank gives: samples or None, the report, what was posted. The ranks are threads.

    run: `pipefusion` or `sample`. toy: options of the toy.
    """
    spec = ParallelSpec(**degrees)
    ends = ENDS[spec.pipe]
    stages = [spec.weights_of(rank).stage for rank in range(spec.num_ranks)]
    models = [model_of(block, range((0, *ends)[at], ends[at]), more=more, **(toy or {})) for at in stages]
    message = Sample(job="j", model="m", patches_id="", spec=spec, **job, **method)

    def on_rank(context):
        posted = []
        with torch.inference_mode():
            samples, report = run(
                models[context.rank], message, message.conds, context, post=posted.append, wish_to_stop=lambda: False
            )
        return samples, report, posted

    return on_threads(spec, on_rank)


def on_one(block, job):
    """The exact samples: the toy as it is written, in the sampler's loop."""
    toy, replay = toy_of(block), replay_of(job)
    with torch.inference_mode():
        for number, call in enumerate(job["program"].calls):
            x = replay.model_input(number)
            replay.answer(number, [evaluated(toy, x, call.timestep, job["conds"][index]) for index in call.conds])
    return replay.output()


def replay_of(job):
    fields = {name: job[name] for name in ("noise", "latent", "noises", "mask")}
    return Replay(job["program"], **fields, dtype=torch.float64)


def evaluated(toy, x, timestep, cond):
    return toy(x, torch.full((len(x),), timestep), cond["context"], {})


class Kept:
    """torch's attention, on whole tensors: keys of the tokens that are computed are new, all others as they were kept.

    Queries of other tokens are computed too, and are of no matter. length: of the sequence that is kept.
    """

    def __init__(self, length):
        self.length = length
        self.kept, self.places, self.number = {}, None, 0

    def begin(self, places):
        """A forward begins, of the tokens at these places of the sequence; None: of all."""
        self.places, self.number = places, 0

    def __call__(self, query, key, value, attn_mask=None, scale=None):
        if key.shape[2] != self.length:
            return PLAIN(query, key, value, attn_mask=attn_mask, scale=scale)
        number, self.number = self.number, self.number + 1
        if self.places is None:
            self.kept[number] = key.clone(), value.clone()
        else:
            for old, new in zip(self.kept[number], (key, value), strict=True):
                old[:, :, self.places] = new[:, :, self.places]
        return PLAIN(query, *self.kept[number], attn_mask=attn_mask, scale=scale)


def emulated(block, job, *, num_patches, warmup_steps=1):
    """The samples and previews of a run in which patch after patch is computed, in one process."""
    toy, replay, shown = toy_of(block), replay_of(job), []
    shape = job["noise"].shape
    lines = [part.tolist() for part in torch.arange(-(-shape[-2] // 2)).tensor_split(num_patches)]
    x, kept = None, {}
    with torch.inference_mode():
        for number, call in enumerate(job["program"].calls):
            came, kind = replay.model_input(number), tuple(call.conds)
            is_exact = number < warmup_steps or kind not in kept
            outs = [torch.full_like(came, torch.nan) for _ in kind]
            if is_exact:
                kept[kind] = [Kept(len(places_of(block, shape, job["conds"][index], lines)[-1])) for index in kind]
            x = came.clone() if is_exact else x
            for patch in [None] if is_exact else range(num_patches):
                pixels = slice(None) if patch is None else slice(2 * lines[patch][0], 2 * lines[patch][-1] + 2)
                x[..., pixels, :] = came[..., pixels, :]
                for index, out, attend in zip(kind, outs, kept[kind], strict=True):
                    cond = job["conds"][index]
                    attend.begin(None if patch is None else places_of(block, shape, cond, lines)[patch])
                    with mock.patch.object(F, "scaled_dot_product_attention", attend):
                        made = evaluated(toy, x, call.timestep, cond)
                    out[..., pixels, :] = made[..., pixels, :]
            replay.answer(number, outs)
            shown += [preview.denoised for preview in replay.previews(number)]
    return replay.output(), shown


def places_of(block, shape, cond, lines):
    """For each patch which tokens of the sequence it is made of, and after the last one all of them.

    lines: the rows of tokens of each.
    """
    num_text = 0 if block is Video else cond["context"].shape[1]
    frames, rows, columns = (1, *shape[2:])[-3:]
    grid = torch.arange(frames * -(-rows // 2) * -(-columns // 2)).view(frames, -(-rows // 2), -(-columns // 2))
    text = torch.arange(num_text).tensor_split(len(lines))
    patches = [torch.cat([part, num_text + grid[:, own].flatten()]) for part, own in zip(text, lines, strict=True)]
    return [*patches, torch.arange(num_text + grid.numel())]
