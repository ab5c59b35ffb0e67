"""N gloo ranks that run jobs for the tests, and the jobs they know.

A job is a function of this file, by name, and its keyword arguments; every rank runs it, and the tests get
every rank's answer. Ranks stay for many jobs; they are forked by `nursery.py`.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import pickle
import select
import tempfile
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from nursery import nursery

JOB_TIMEOUT_S = 120


class Ranks:
    """A context manager: `run(job, **arguments)` → the answers of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks

    def __enter__(self) -> Ranks:
        self._folder = tempfile.TemporaryDirectory()
        self._num_starts = 0
        self._processes: list[int] = []
        return self

    def _start(self) -> None:
        self._num_starts += 1
        store = str(Path(self._folder.name) / f"store{self._num_starts}")
        jobs, answers = ([os.pipe() for _ in range(self.num_ranks)] for _ in range(2))
        theirs = [(job[0], answer[1]) for job, answer in zip(jobs, answers, strict=True)]
        self._processes = nursery().fork(store, theirs)
        for end in itertools.chain(*theirs):
            os.close(end)
        self._jobs = [os.fdopen(job[1], "wb") for job in jobs]
        self._answers = [os.fdopen(answer[0], "rb") for answer in answers]

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Raises AssertionError with the trace of the first rank that failed, or when one takes too long."""
        if not self._processes:
            self._start()
        for stream in self._jobs:
            pickle.dump((job, arguments), stream)
            stream.flush()
        streams = {stream: rank for rank, stream in enumerate(self._answers)}
        answers: dict[int, Any] = {}
        while streams:
            ready, _, _ = select.select(list(streams), [], [], JOB_TIMEOUT_S)
            if not ready:
                self._stop()
                raise AssertionError(f"ranks {sorted(streams.values())} gave no answer")
            for stream in ready:
                rank = streams.pop(stream)
                answers[rank], trace = pickle.load(stream)
                if trace:
                    self._stop()  # the others may wait for it in a collective
                    raise AssertionError(f"rank {rank}:\n{trace}")
        return [answers[rank] for rank in range(self.num_ranks)]

    def _stop(self) -> None:
        if self._processes:
            nursery().end(self._processes)
            for stream in (*self._jobs, *self._answers):
                stream.close()
        self._processes = []

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._folder.cleanup()


def tiny_model(family: str, *, heads: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random model of `family`, the same in every process."""
    from comfy_xdit.models import FAMILIES
    from comfy_xdit.parallel.spec import ModelShape

    layers = options.get("layers", 2)
    config = {"attention_head_dim": 8, "num_attention_heads": heads, "num_layers": layers}
    config |= {"joint_attention_dim": 12} if family != "pixart" else {}
    if family == "pixart":
        config |= {"attention_head_dim": 12, "cross_attention_dim": 12 * heads, "caption_channels": 12}
        config |= {"use_additional_conditions": options.get("alpha", False), "interpolation_scale": None}
    elif family == "flux":
        config |= {"in_channels": 16, "num_single_layers": layers, "axes_dims_rope": (4, 2, 2)}
        config |= {"pooled_projection_dim": 10, "guidance_embeds": options.get("guidance", True)}
    else:
        config |= {"sample_size": 24, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 12}
        config |= {"caption_projection_dim": 8 * heads, "pooled_projection_dim": 10}
        config |= {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if options.get("dual") else {}
    torch.manual_seed(0)
    kind = FAMILIES[family]
    module = kind.model_class()(**config).to(dtype).eval().requires_grad_(False)
    shape = ModelShape(title=kind.title, num_heads=heads, num_blocks=2)
    return SimpleNamespace(family=kind, module=module, shape=shape, compute_dtype=dtype)


def tiny_call(
    family: str, *, seed: int, batch: int, size: tuple[int, int], text: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A call as ComfyUI makes it; size: of the latent, for Flux (see `tiny.picture`)."""
    from tiny import picture

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    size = picture(family, size)
    call = {"x": random(batch, 4, *size), "context": random(batch, text, 12)}
    if family == "pixart":
        call |= {"c_size": 300 + 9 * random(batch, 2).abs(), "c_ar": random(batch, 1).abs()}
    else:
        call["y"] = random(batch, 10)
    call["timestep"] = torch.rand(batch, generator=generator) * (1 if family == "flux" else 1000)
    if family == "flux":
        call["guidance"] = torch.rand(batch, generator=generator).to(dtype) * 4
    return call


def run_denoise(model: dict[str, Any], calls: list[dict], chunks: list[int], degrees: dict[str, int]) -> Any:
    """Job: `denoise` of a tiny model; (outputs or None, report)."""
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.denoise import denoise
    from comfy_xdit.parallel.spec import ParallelSpec

    context = ParallelContext(ParallelSpec(**degrees), groups())
    with context, torch.inference_mode():
        return denoise(tiny_model(**model), calls, chunks, context)


def run_resident(
    load: Any, patches: list[Any], calls: list[dict], chunks: list[int], degrees: dict[str, int]
) -> dict[str, Any]:
    """Job: load this rank's part of a file, evaluate it bare, with the patches on, and after they came off.

    load: a LoadModel without a spec.
    """
    import dataclasses

    from comfy_xdit.messages import SetPatches
    from comfy_xdit.models.resident import load as load_model
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.denoise import denoise
    from comfy_xdit.parallel.spec import ParallelSpec

    spec = ParallelSpec(**degrees)
    model = load_model(dataclasses.replace(load, spec=spec), "cpu", rank=groups().rank)
    answer: dict[str, Any] = {"bytes": model.bytes_held(), "outputs": []}
    for patches_id, wanted in (("", []), ("on", patches), ("", [])):
        model.set_patches(SetPatches(model=load.model, patches_id=patches_id, patches=wanted))
        answer[f"bytes {patches_id or 'off'}"] = model.bytes_held()
        with ParallelContext(spec, groups()) as context, torch.inference_mode():
            outputs, report = denoise(model, calls, chunks, context)
        answer["outputs"].append(outputs)
        answer["sent"] = report["bytes_sent"]
    return answer


def run_checkpoint(path: str, family: str, call: dict[str, Any], chunks: int, degrees: dict[str, int]) -> dict:
    """Job: the report of `denoise` of a model from a file."""
    from comfy_xdit.messages import LoadModel
    from comfy_xdit.models.resident import load
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.denoise import denoise
    from comfy_xdit.parallel.spec import ParallelSpec

    spec = ParallelSpec(**degrees)
    names = {"storage_dtype": "float32", "compute_dtype": "float32"}
    message = LoadModel(model="m", path=path, prefix="", family=family, spec=spec, **names)
    model = load(message, torch.device("cpu"), rank=groups().rank)
    with ParallelContext(spec, groups()) as context, torch.inference_mode():
        return denoise(model, [call], [chunks], context)[1]


def sample_checkpoint(path: str, family: str, fields: dict[str, Any], degrees: dict[str, int], **method: Any) -> dict:
    """Job: the report of a sampling run of a model from a file."""
    from comfy_xdit.messages import LoadModel, Sample
    from comfy_xdit.models.resident import load
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.sample import sample
    from comfy_xdit.parallel.spec import ParallelSpec

    spec = ParallelSpec(**degrees)
    names = {"storage_dtype": "float32", "compute_dtype": "float32"}
    model = load(
        LoadModel(model="m", path=path, prefix="", family=family, spec=spec, **names),
        torch.device("cpu"),
        rank=groups().rank,
    )
    message = Sample(job="j", model="m", patches_id="", spec=spec, **fields, **method)
    with ParallelContext(spec, groups(), trace=True) as context, torch.inference_mode():
        return sample(
            model, message, message.conds, context, post=lambda entry: None, wish_to_stop=lambda: False
        )[1]


def run_probe(num_local: int | None = None, cards: list[tuple[str, int]] | None = None) -> dict[str, Any]:
    """Job: what this rank measured, where so many ranks share a machine.

    cards: name and bytes of each rank's device, in place of what is there.
    """
    from comfy_xdit.cost import probe
    from comfy_xdit.parallel.groups import GroupCache

    cache = GroupCache(torch.distributed.get_world_size(), num_local)
    card = probe._device if cards is None else lambda device: cards[torch.distributed.get_rank()]
    try:
        with mock.patch.object(probe, "_device", card):
            return probe.probe(cache, torch.device("cpu"))
    finally:
        cache.close()


def run_exchange(sizes: list[list[int]], num_local: int) -> tuple[torch.Tensor, int]:
    """Job: what this rank gets of an all-to-all, and the bytes it counts, where so many ranks share a machine.

    sizes: rank → for each rank, how many numbers go to it.
    """
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.groups import GroupCache
    from comfy_xdit.parallel.sequence import exchange
    from comfy_xdit.parallel.spec import ParallelSpec

    cache = GroupCache(len(sizes), num_local)
    with ParallelContext(ParallelSpec(ulysses=len(sizes)), cache) as context:
        axis = context.axis("ulysses")
        own = sizes[axis.index]
        send = torch.arange(sum(own), dtype=torch.float32) + 1000 * axis.index
        received = exchange(send, own, [row[axis.index] for row in sizes], axis)
        found = received, context.traffic.bytes["all_to_all"]
    cache.close()
    return found


def refusal_of(**arguments: Any) -> str:
    """Job: the sentence with which `run_denoise` refuses."""
    try:
        run_denoise(**arguments)
    except ValueError as error:
        return str(error)
    return ""


def run_sample(model: Any, degrees: dict[str, int], stop_at: int | None = None, **fields: Any) -> Any:
    """Job: a whole `sample` of a tiny model; (samples or None, report, progress posted).

    model: of `tiny_model`; or a LoadModel without a spec, of which each rank loads its part. fields: of the
    `Sample` message. stop_at: the number of evaluations after which this rank wishes to stop.
    """
    from comfy_xdit.messages import Sample
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.sample import sample
    from comfy_xdit.parallel.spec import ParallelSpec

    spec = ParallelSpec(**degrees)
    resident = tiny_model(**model) if isinstance(model, dict) else load_part(model, spec)
    message = Sample(job="job", model="m", patches_id="", spec=spec, **{"mask": None, **fields})
    posted: list[dict[str, Any]] = []
    with ParallelContext(spec, groups()) as context, torch.inference_mode():
        samples, report = sample(
            resident,
            message,
            message.conds,
            context,
            post=posted.append,
            wish_to_stop=lambda: stop_at is not None and len(posted) >= stop_at,
        )
    return samples, report, posted


def load_part(load: Any, spec: Any) -> Any:
    """What this rank holds of the model of a LoadModel."""
    import dataclasses

    from comfy_xdit.models.resident import load as load_model

    return load_model(dataclasses.replace(load, spec=spec), "cpu", rank=groups().rank)


def buffers_left_by(**arguments: Any) -> tuple[int, int]:
    """Job: how many buffers of old keys `run_sample` made, and how many are there after it."""
    from comfy_xdit.parallel import distri

    made = []

    class Watched(distri._Gather):
        def __init__(self, **fields: Any) -> None:
            super().__init__(**fields)
            made.append(weakref.ref(self.received))

    with mock.patch.object(distri, "_Gather", Watched):
        run_sample(**arguments)
    gc.collect()
    return len(made), sum(buffer() is not None for buffer in made)


def plain_denoise(model: dict[str, Any], calls: list[dict]) -> list[torch.Tensor]:
    """What diffusers' own forward gives, without our engine."""
    whole = tiny_model(**model)
    outputs = []
    for call in calls:
        arguments = whole.family.inputs(dict(whole.module.config), call)
        with torch.inference_mode():
            out = whole.module(**arguments, return_dict=False)[0]
        outputs.append(whole.family.output(out, call))
    return outputs


def run_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    mask: torch.Tensor | None,
    degrees: dict[str, int],
    key_lengths: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Job: attention over whole tensors: each rank cuts its tokens, attends, and joins the output.

    key_lengths: of the streams of keys and values, where they are others.
    """
    from comfy_xdit.parallel.attention import Layer, SequenceAttention
    from comfy_xdit.parallel.context import ParallelContext
    from comfy_xdit.parallel.sequence import cut, join
    from comfy_xdit.parallel.spec import ParallelSpec

    context = ParallelContext(ParallelSpec(**degrees), groups())
    axis = context.axis("sequence")

    def shard(x: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([cut(stream, 2, axis) for stream in x.split(lengths, 2)], 2)

    layer = Layer(path="attn", lengths=lengths, num_shards=axis.degree, key_lengths=key_lengths)
    k, v = (shard(x, key_lengths or lengths) for x in (k, v))
    out = SequenceAttention(context)(shard(q, lengths), k, v, layer, mask=mask, scale=None)
    own = [cut(torch.empty(length), 0, axis).shape[0] for length in lengths]
    parts = zip(out.split(own, 2), lengths, strict=True)
    return torch.cat([join(part, 2, length, axis) for part, length in parts], 2)


def run_of(module: str, function: str, arguments: dict[str, Any]) -> Any:
    """Job: one that another file of the tests defines."""
    return getattr(importlib.import_module(module), function)(**arguments)


def groups() -> Any:
    """This process's group cache, made once; of one rank where torch.distributed isn't initialised."""
    from comfy_xdit.parallel.groups import GroupCache

    if not hasattr(groups, "cache"):
        initialised = torch.distributed.is_initialized()
        groups.cache = GroupCache(torch.distributed.get_world_size() if initialised else 1)
    return groups.cache


def serve(rank: int, num_ranks: int, store: str, jobs: int, answers: int) -> None:
    """Do what comes in at the descriptor `jobs`, until its end."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, num_ranks), rank=rank, world_size=num_ranks
    )
    with os.fdopen(jobs, "rb") as asked, os.fdopen(answers, "wb") as told:
        while True:
            try:
                job, arguments = pickle.load(asked)
            except EOFError:
                return
            try:
                answer = globals()[job](**arguments), ""
            except Exception:
                answer = None, traceback.format_exc()
            pickle.dump(answer, told)
            told.flush()
