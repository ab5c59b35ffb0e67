"""What a rank holds, in bytes that are there: parameters, and keys and values as the table of docs/cost-model.md."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import tiny
import torch
from programs import flow_program
from ranks import Ranks, groups
from staged import sampling_job, spread_model

from comfy_xdit.cost.arithmetic import read_network
from comfy_xdit.cost.memory import memory
from comfy_xdit.cost.work import Work
from comfy_xdit.messages import LoadModel, Sample
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.sample import sample
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.weights.resident import load

FILES = {
    "flux": ("flux", tiny.flux_shapes(heads=4, depth=4, depth_single=8)),
    "sd3": ("sd3", tiny.sd3_shapes(heads=4, depth=6, dual=())),
}


@pytest.fixture(params=FILES)
def message(request, tmp_path) -> LoadModel:
    family, shapes = FILES[request.param]
    path = tiny.write(tmp_path / "model.safetensors", tiny.random_weights(shapes))
    names = {"storage_dtype": "float32", "compute_dtype": "float32"}
    return LoadModel(model="m", path=path, prefix="", family=family, **names)


def parts(message: LoadModel, spec: ParallelSpec) -> list[Any]:
    return [load(dataclasses.replace(message, spec=spec), "cpu", rank=rank) for rank in range(spec.num_ranks)]


def real_bytes(model: Any, path: str = "") -> int:
    """Of the memory that the weights of a submodule keep: views of the file count as what they show of it."""
    found = {}
    module = model.module.get_submodule(path)
    for tensor in [*module.parameters(), *module.buffers()]:
        if not tensor.is_meta:
            is_view = model._file.holds(tensor)
            found[tensor.data_ptr() if is_view else tensor.untyped_storage().data_ptr()] = (
                tensor.nbytes if is_view else tensor.untyped_storage().nbytes()
            )
    return sum(found.values())


def block_bytes(model: Any) -> list[int]:
    return [real_bytes(model, path) for path in model.block_paths]


@pytest.mark.parametrize("degree", [2, 4])
def test_tensor_parallel_holds_one_nth_of_each_block(message, degree) -> None:
    whole = load(message, "cpu")
    for model in parts(message, ParallelSpec(tensor=degree)):
        for own, block in zip(block_bytes(model), block_bytes(whole), strict=True):
            assert own == pytest.approx(block / degree, rel=0.02), "norms are whole, some biases are on one rank"
        everything, blocks = real_bytes(whole), sum(block_bytes(whole))
        assert real_bytes(model) - sum(block_bytes(model)) == everything - blocks, "embedders are whole"
        assert abs(real_bytes(model) - everything / degree) <= max(block_bytes(whole)) + everything - blocks


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_stages_hold_each_block_once_and_one_nth_where_blocks_are_alike(message, degree) -> None:
    whole, models = load(message, "cpu"), parts(message, ParallelSpec(pipe=degree))
    blocks = block_bytes(whole)
    assert [sum(own) for own in zip(*map(block_bytes, models), strict=True)] == blocks
    for model in models:
        share = sum(block_bytes(model))
        # A double block of Flux has more than twice a single one's weights, and takes as long.
        first, last = model.stage[0], model.stage[-1]
        assert share == sum(blocks[first : last + 1])
        if message.family == "sd3":
            assert abs(share - sum(blocks) / degree) <= max(blocks)


@pytest.mark.parametrize(
    "degrees", [{}, {"pipe": 2}, {"pipe": 4}, {"tensor": 2}, {"tensor": 4}, {"pipe": 2, "tensor": 2}], ids=str
)
def test_the_cost_model_says_what_is_held(message, degrees) -> None:
    spec, network = ParallelSpec(**degrees), read_network(message.path)
    for rank, model in enumerate(parts(message, spec)):
        held, work = real_bytes(model), Work(latent=(12, 8), text_tokens=8)
        said = memory(network, work, spec, rank).parameters
        assert held <= said <= 1.04 * held and (degrees or held == said)


TEXT, ROWS, COLUMNS = 8, 6, 4
TOKENS = TEXT + ROWS * COLUMNS
LAYERS, HEADS, HEAD_DIM, BYTES = 4, 8, 8, 8
KINDS = {
    "flux": {"family": "flux", "heads": HEADS, "layers": LAYERS // 2, "dtype": torch.float64},
    "sd3": {"family": "sd3", "heads": HEADS, "layers": LAYERS, "dtype": torch.float64},
}
WHOLE = 2 * 2 * TOKENS * HEADS * HEAD_DIM * BYTES * LAYERS
"""Keys and values of all tokens, of cond and uncond, in all layers."""

KEPT = [
    *(({axis: 2}, 0) for axis in ("dp", "cfg", "ring", "ulysses", "tensor")),
    ({"pipe": 2}, WHOLE / 2),
    ({"distri": 2}, WHOLE * 3 / 2),
    ({"pipe": 4}, WHOLE / 4),
    ({"distri": 4}, WHOLE * 5 / 4),
    ({"pipe": 2, "cfg": 2}, WHOLE / 2 / 2),
    ({"pipe": 2, "dp": 2}, WHOLE / 2 / 2),
    ({"pipe": 2, "ulysses": 2}, WHOLE / 2 / 2),
    ({"pipe": 2, "ring": 2}, WHOLE / 2),
    ({"pipe": 2, "tensor": 2}, WHOLE / 2 / 2),
    ({"distri": 2, "cfg": 2}, WHOLE * 3 / 2 / 2),
    ({"distri": 2, "ulysses": 2}, WHOLE * 3 / 2 / 2),
    ({"distri": 2, "ring": 2}, WHOLE * 3 / 2 / 2),
    ({"distri": 2, "tensor": 2}, WHOLE * 3 / 2 / 2),
]
"""Degrees, and what the table says that each rank keeps: of pipe the layers / N, of distri all and a share once more."""


def kept_in_run(spec: ParallelSpec, model: dict[str, Any], fields: dict[str, Any]) -> tuple[int, int]:
    """Job: the most bytes of keys and values that are alive here between two evaluations, and what the report says."""

    def most_alive(stale: bool) -> tuple[int, int]:
        alive: list[int] = []

        def look() -> bool:
            alive.append(sum(storages(spec).values()))
            return False

        message = Sample(job="j", model="m", patches_id="", spec=spec, num_patches=3, stale=stale, **fields)
        with torch.inference_mode(), ParallelContext(spec, groups()) as context:
            own = spread_model(spec, groups().rank, **model)
            _, report = sample(own, message, message.conds, context, post=lambda entry: None, wish_to_stop=look)
        # A pipeline asks ahead. Else the least after the first evaluation: what went round may be let go of late.
        return max(alive) if spec.pipe > 1 else min(alive[1:]), report.get("buffer_bytes", 0)

    with_old, reported = most_alive(True)
    without, nothing = most_alive(False)
    assert nothing == 0
    return with_old - without, reported


def storages(spec: ParallelSpec) -> dict[int, int]:
    """Memory of tensors, by address. Beside a pipeline's buffers messages are on their way: those have no heads."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and not thing.is_meta]
    if spec.pipe > 1:
        tensors = [x for x in tensors if x.dim() == 4 and x.shape[2:] == (TOKENS, HEAD_DIM)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    with Ranks(request.param) as started:
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_kept_keys_are_the_tables(ranks, kind) -> None:
    fields = sampling_job(KINDS[kind], flow_program(steps=4, cfg=2.0), size=(2 * ROWS, 2 * COLUMNS), texts=(TEXT, TEXT))
    for degrees, expected in KEPT:
        spec = ParallelSpec(**degrees)
        if spec.num_ranks == ranks.num_ranks:
            arguments = {"spec": spec, "model": KINDS[kind], "fields": fields}
            answers = ranks.run("run_of", module="test_memory", function="kept_in_run", arguments=arguments)
            assert answers == [(expected, expected)] * spec.num_ranks, degrees
