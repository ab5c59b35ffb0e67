"""Runs of the real `Service` on every rank of a pool of pretended GPUs, one rank after the other, and their records."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import tiny_vae
import torch
from comfy_xdit_bench.vae_checkpoint import write_vae
from events import Event, Wait
from pretend_cuda import pretending
from programs import flow_program

from comfy_xdit.mailbox import Mailbox
from comfy_xdit.messages import (
    Denoise,
    Held,
    Hold,
    LoadModel,
    LoadVAE,
    Message,
    Patch,
    Peek,
    Probe,
    Result,
    Sample,
    SetPatches,
    Status,
    VAEDecode,
    VAEEncode,
    encode,
)
from comfy_xdit.parallel.spec import ParallelSpec

HEADS, CHANNELS, TEXT, VECTOR = 8, 4, 24, 20
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run. depth: blocks of each kind; steps: 0 for two single evaluations; lora: the model wears patches."""

    family: str = "flux"
    degrees: dict[str, int] = dataclasses.field(default_factory=dict)
    storage: str = "bfloat16"
    compute: str = "bfloat16"
    capability: tuple[int, int] = (8, 9)
    steps: int = 3
    depth: int = 1
    cfg: float = 3.0
    batch: int = 1
    size: tuple[int, int] = (64, 64)
    num_patches: int = 0
    lora: bool = False
    mask: bool = False
    heads: int = HEADS

    @property
    def spec(self) -> ParallelSpec:
        return ParallelSpec(**self.degrees)

    def __str__(self) -> str:
        kept = self.storage if self.storage == self.compute else f"{self.storage} as {self.compute}"
        card = ".".join(map(str, self.capability))
        extras = [name for name in ("lora", "mask") if getattr(self, name)] + ["one by one"] * (not self.steps)
        return f"{self.family} {self.spec}, {kept}, sm {card}{', ' if extras else ''}{', '.join(extras)}"


@dataclasses.dataclass(kw_only=True)
class Played:
    """What one rank did. loaded: until the model was ready; ran: in the job itself; answer: the job's."""

    loaded: list[Event]
    ran: list[Event]
    answer: Result

    @property
    def waits(self) -> list[Wait]:
        """Where the host waited for the device in the job."""
        return [event for event in self.ran if isinstance(event, Wait)]


def play(case: Case) -> list[Played]:
    """Load and run on every rank. Raises AssertionError where CUDA or NCCL would refuse."""
    return [_play_rank(case, rank) for rank in range(case.spec.num_ranks)]


def _play_rank(case: Case, rank: int) -> Played:
    from comfy_xdit_worker.service import Service

    spec = case.spec
    with pretending(rank, spec.num_ranks, case.capability) as device:
        service = Service(rank=rank, world_size=spec.num_ranks, device=device.device)

        def ask(message: Message) -> Result:
            answer = service.handle(message)
            encode(answer)  # With its copy to the host, as the loop does.
            return answer

        ask(
            LoadModel(
                model="m",
                path=model_file(case.family, case.depth, case.storage, case.heads),
                prefix="",
                family=case.family,
                storage_dtype=case.storage,
                compute_dtype=case.compute,
                spec=spec,
            )
        )
        patches_id = ""
        if case.lora:
            patches_id = "worn"
            ask(SetPatches(model="m", patches_id=patches_id, patches=patches_for(case)))
        conds = [conditioning(case, number) for number in range(2 if case.cfg != 1 else 1)]
        for number, cond in enumerate(conds):
            for key, value in cond.items():
                ask(Hold(name=f"{number} {key}", value=value))
                cond[key] = Held(name=f"{number} {key}")
        ask(Status())
        loaded = list(device.events)
        device.events.clear()
        if case.steps:
            with _client(service):
                answer = ask(_whole_run(case, patches_id, conds))
        else:
            for _ in range(2):
                answer = ask(_one_evaluation(case, patches_id, conds))
        return Played(loaded=loaded, ran=device.events, answer=answer)


@contextlib.contextmanager
def _client(service: Any) -> Iterator[None]:
    """Somebody asks for each preview of the run as soon as it is there."""
    post = Mailbox.post

    def asked(mailbox: Mailbox, *args: Any, **kwargs: Any) -> None:
        post(mailbox, *args, **kwargs)
        encode(service.aside(Peek(job="j")))

    with mock.patch.object(Mailbox, "post", asked):
        yield


def _whole_run(case: Case, patches_id: str, conds: list[dict[str, Any]]) -> Sample:
    program = flow_program(steps=case.steps, cfg=case.cfg, noisy=True)
    latent = torch.zeros((case.batch, CHANNELS, *case.size))
    return Sample(
        job="j",
        model="m",
        patches_id=patches_id,
        spec=case.spec,
        program=program,
        conds=conds,
        noise=latent,
        latent=latent,
        noises=[latent for _ in program.calls],
        mask=None,
        num_patches=case.num_patches,
    )


def _one_evaluation(case: Case, patches_id: str, conds: list[dict[str, Any]]) -> Denoise:
    x = torch.zeros((case.batch, CHANNELS, *case.size), dtype=getattr(torch, case.compute))
    calls = [{**cond, "x": x, "timestep": torch.ones(case.batch)} for cond in conds]
    return Denoise(model="m", patches_id=patches_id, spec=case.spec, calls=calls, chunks=[1] * len(calls))


def conditioning(case: Case, number: int) -> dict[str, Any]:
    """As ComfyUI would pass it; cond and uncond differ in numbers only, so that they make one batch."""
    dtype = getattr(torch, case.compute)
    found: dict[str, Any] = {"context": torch.zeros((1, 16, TEXT), dtype=dtype)}
    if case.family != "pixart":
        found["y"] = torch.zeros((1, VECTOR), dtype=dtype)
    if case.family == "flux":
        found["guidance"] = torch.full((1,), 3.5, dtype=dtype)
        if case.mask:
            num_tokens = 16 + prod(case.size) // 4
            found["attention_mask"] = torch.ones((1, num_tokens, num_tokens), dtype=torch.bool)
    return found


def patches_for(case: Case) -> list[Patch]:
    """A LoRA of each kind of layer: one that is cut by columns, one by rows, and a plain difference."""
    layers = {
        "flux": ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.0"),
        "sd3": tuple(f"joint_blocks.0.{x}" for x in ("x_block.attn.qkv", "x_block.mlp.fc2", "context_block.mlp.fc1")),
        "pixart": ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.0.mlp.fc1"),
    }[case.family]
    shapes = model_shapes(case.family, case.depth, case.heads)
    made = []
    for number, layer in enumerate(layers):
        rows, columns = shapes[f"{layer}.weight"]
        lora = [torch.zeros((rows, 4)), torch.zeros((4, columns)), 4.0, None, None, None]
        kind, weights = ("lora", lora) if number < 2 else ("diff", [torch.zeros((rows, columns))])
        made.append(Patch(key=f"{layer}.weight", kind=kind, weights=weights, strength=0.5))
    return made


def model_shapes(family: str, depth: int, heads: int = HEADS) -> tiny.Shapes:
    """Widths of heads as the real models have them."""
    if family == "flux":
        return tiny.flux_shapes(heads=heads, head_dim=128, depth=depth, depth_single=depth)
    if family == "sd3":
        return tiny.sd3_shapes(heads=heads, depth=2 * depth, side=96)
    return tiny.pixart_shapes(heads=heads, depth=2 * depth)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def model_file(family: str, depth: int, dtype: str, heads: int = HEADS) -> str:
    """A checkpoint of zeros that takes no room on the disk: its numbers are a hole in the file."""
    path = Path(_folder().name) / f"{family}-{depth}-{heads}-{dtype}.safetensors"
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    header, end = {}, 0
    for key, shape in model_shapes(family, depth, heads).items():
        begin, end = end, end + prod(shape) * size
        header[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return str(path)


def play_vae(num_ranks: int, dtype: str, rows: int) -> list[list[Event]]:
    """Load a VAE on so many ranks, decode a latent of so many rows, and encode what would be its image."""
    from comfy_xdit_worker.service import Service

    records = []
    for rank in range(num_ranks):
        with pretending(rank, num_ranks) as device:
            service = Service(rank=rank, world_size=num_ranks, device=device.device)
            encode(service.handle(LoadVAE(vae="v", path=vae_file(), dtype=dtype)))
            device.events.clear()
            latent = torch.zeros((2, 4, rows, 8))
            decoded = service.handle(VAEDecode(vae="v", latent=latent)).value
            encoded = service.handle(VAEEncode(vae="v", image=torch.zeros((2, 3, 4 * rows, 32)))).value
            if rank == 0:
                assert (decoded.shape, encoded.shape) == ((2, 3, 4 * rows, 32), (2, 8, rows, 8))
            records.append(device.events)
    return records


def play_probe(num_ranks: int) -> list[list[Event]]:
    """The pool's measurement of its links, by a clock that stands still: how much is sent next depends on the time."""
    from comfy_xdit_worker.service import Service

    records = []
    for rank in range(num_ranks):
        with pretending(rank, num_ranks) as device, mock.patch("time.perf_counter", lambda: 0.0):
            Service(rank=rank, world_size=num_ranks, device=device.device).handle(Probe())
            records.append(device.events)
    return records


@cache
def vae_file() -> str:
    return str(write_vae(Path(_folder().name) / "vae.safetensors", tiny_vae.config()))
