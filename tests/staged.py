"""Jobs of PipeFusion's tests: tiny models of which a rank holds one stage, sampler programs, and their oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from programs import flow_program, heun_program, lonely_program, plus_program
from ranks import groups, tiny_model
from tiny import picture
from torch import nn

from comfy_xdit.messages import LoadModel, Sample
from comfy_xdit.models.resident import load
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.denoise import denoise
from comfy_xdit.parallel.pipefusion import pipefusion
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.stages import block_costs, block_paths, keep_stage, stages
from comfy_xdit.parallel.tensor import keep_own_heads, regions
from comfy_xdit.trajectory import Operation, SamplerProgram


def staged_model(*, stage: int = 0, num_stages: int = 1, **options: Any) -> Any:
    """`tiny_model` with only the blocks of one stage, as the workers load it."""
    model = tiny_model(**options)
    plan, module = model.family.plan, model.module
    model.block_paths = block_paths(module, plan)
    model.shape = dataclasses.replace(model.shape, num_blocks=len(model.block_paths))
    model.stage = stages(block_costs(module, plan), num_stages)[stage]
    keep_stage(module, plan, model.stage)
    if stage + 1 < num_stages:
        for name in model.family.after_blocks:
            module.get_submodule(name).to("meta")
    return model


def spread_model(spec: ParallelSpec, rank: int, **options: Any) -> Any:
    """What `rank` holds of `tiny_model` with `spec`: the blocks of its stage, and its shards of those."""
    share = spec.weights_of(rank)
    model = staged_model(stage=share.stage, num_stages=share.num_stages, **options)
    plan, module = model.family.plan.tensor, model.module
    for name, region in regions(module, plan, share).items() if share.num_shards > 1 else ():
        path, _, parameter = name.rpartition(".")
        owner = module.get_submodule(path)
        if region is not None:
            part = region.columns_of(getattr(owner, parameter).narrow(0, region.row, region.rows))
            setattr(owner, parameter, nn.Parameter(part.clone(), requires_grad=False))
    if share.num_shards > 1:
        keep_own_heads(module, plan, share)
    return model


def run_pipefusion(
    model: dict[str, Any], job: dict[str, Any], degrees: dict[str, int], stop_after: int | None = None, **method: Any
) -> tuple[torch.Tensor | None, dict[str, Any], list[dict[str, Any]]]:
    """Job: (samples or None, report, what was posted)."""
    spec = ParallelSpec(**degrees)
    index, degree = (spec.weights_of(groups().rank).stage, spec.pipe)
    return sampled(staged_model(stage=index, num_stages=degree, **model), job, spec, stop_after, **method)


def run_loaded(
    path: str, family: str, job: dict[str, Any], degrees: dict[str, int], **method: Any
) -> tuple[torch.Tensor | None, dict[str, Any], list[dict[str, Any]]]:
    """Job: as `run_pipefusion`, of a file in fp64 from which each rank loads its part."""
    names = {"storage_dtype": "float64", "compute_dtype": "float64"}
    spec = ParallelSpec(**degrees)
    message = LoadModel(model="m", path=path, prefix="", family=family, spec=spec, **names)
    return sampled(load(message, "cpu", rank=groups().rank), job, spec, **method)


def sampled(
    model: Any, job: dict[str, Any], spec: ParallelSpec, stop_after: int | None = None, **method: Any
) -> tuple[torch.Tensor | None, dict[str, Any], list[dict[str, Any]]]:
    message = Sample(job="j", model="m", patches_id="", spec=spec, **job, **method)
    posted: list[dict[str, Any]] = []
    asked = 0

    def wish_to_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > stop_after

    with ParallelContext(spec, groups()) as context, torch.inference_mode():
        samples, report = pipefusion(
            model, message, message.conds, context, post=posted.append, wish_to_stop=wish_to_stop
        )
    return samples, report, posted


def run_steps(model: dict[str, Any], calls: list[dict], chunks: list[int], degrees: dict[str, int]) -> Any:
    """Job: single evaluations, (outputs or None, report)."""
    with ParallelContext(ParallelSpec(**degrees), groups()) as context, torch.inference_mode():
        place = context.axis("pipe")
        whole = staged_model(stage=place.index, num_stages=place.degree, **model)
        return denoise(whole, calls, chunks, context)


def refusal(**arguments: Any) -> str:
    """Job: the sentence with which `run_pipefusion` refuses."""
    try:
        run_pipefusion(**arguments)
    except ValueError as error:
        return str(error)
    return ""


def sampling_job(
    model: dict[str, Any],
    program: SamplerProgram,
    *,
    size: tuple[int, int] = (10, 6),
    batch: int = 1,
    texts: tuple[int, ...] = (5, 5),
    masked: bool = False,
    references: tuple[tuple[int, int], ...] = (),
    widths: tuple[int, int] = (12, 10),
    seed: int = 0,
) -> dict[str, Any]:
    """The fields of a `Sample` that a program needs, of random numbers in the model's dtype.

    size: of the latent, for Flux (see `tiny.picture`). widths: of the text's tokens and of pooled text.
    references: sizes of reference latents.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = model.get("dtype", torch.float32)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    latent = (batch, 4, *picture(model["family"], size))
    conds = []
    for number, _ in enumerate(program.conds):
        cond: dict[str, Any] = {"context": random(1, texts[number], widths[0])}
        if model["family"] == "pixart":
            cond |= {"c_size": 300 * random(1, 2).abs(), "c_ar": random(1, 1).abs()}
        else:
            cond["y"] = random(1, widths[1])
        if model["family"] == "flux":
            cond["guidance"] = random(1).abs()
        if references:
            cond["ref_latents"] = [random(1, 4, *shape) for shape in references]
        conds.append(cond)
    if model["family"] != "flux":
        calls = [dataclasses.replace(call, timestep=1000 * call.timestep) for call in program.calls]
        program = dataclasses.replace(program, calls=calls)
    mask = (random(*latent) > 0).to(dtype) if masked else None
    if masked:
        program = inpainting(program)
    return {
        "program": program, "conds": conds, "noise": random(*latent), "latent": random(*latent), "mask": mask,
        "noises": [random(*latent) for _ in program.calls],
    }


def inpainting(program: SamplerProgram) -> SamplerProgram:
    """The program as with a mask: the network is given, and the run ends with, the known latent where the mask is 0."""

    def blend(made: str, known: str, name: str) -> list[Operation]:
        return [
            Operation(function="mul", operands=[made, "mask"], result=name + "m"),
            Operation(function="sub", operands=[1.0, "mask"], result=name + "r"),
            Operation(function="mul", operands=[known, name + "r"], result=name + "k"),
            Operation(function="add", operands=[name + "m", name + "k"], result=name),
        ]

    def noised(sigma: float, name: str) -> list[Operation]:
        return [
            Operation(function="mul", operands=["noise", sigma], result=name + "n"),
            Operation(function="mul", operands=["latent", 1.0 - sigma], result=name + "l"),
            Operation(function="add", operands=[name + "n", name + "l"], result=name),
        ]

    calls = []
    for number, call in enumerate(program.calls):
        known, made = f"known{number}", f"made{number}"
        before = [*call.before, *noised(call.sigma, known), *blend(call.x, known, made)]
        calls.append(dataclasses.replace(call, before=before, x=made))
    after = [*program.after, *blend(program.output, "latent", "end")]
    return dataclasses.replace(program, calls=calls, after=after, output="end")


PROGRAMS = {
    "euler": lambda: flow_program(steps=4, cfg=2.5),
    "euler without cfg": lambda: flow_program(steps=4),
    "multistep": lambda: flow_program(steps=5, cfg=2.5, kind="multistep"),
    "ancestral": lambda: flow_program(steps=4, cfg=2.5, noisy=True),
    "multistep with noise": lambda: flow_program(steps=5, cfg=2.5, kind="multistep", noisy=True),
    "cfg++": lambda: plus_program(steps=4, cfg=1.5),
    "two evaluations a step": lambda: heun_program(steps=3, cfg=2.5),
    "negative left out": lambda: lonely_program(steps=6, cfg=2.5),
}
