"""Attention that goes past the engine is a fault that names the module, with every method."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modes import METHODS, Job
from ranks import Ranks, groups
from staged import spread_model
from torch import Tensor

from comfy_xdit.messages import Sample
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.cut import cut
from comfy_xdit.parallel.sample import sample
from comfy_xdit.parallel.spec import ParallelSpec

SPECS = [{axis: 2} for axis in ("ulysses", "ring", "distri", "tensor", "pipe", "cfg")]


class Past:
    """A processor that attends in another way: torch's function modes are off, as for what is called below them."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self._processor(*args, **kwargs)


class Twice(Past):
    """A processor that attends once more."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        F.scaled_dot_product_attention(*(torch.zeros(1, 1, 1, 8) for _ in range(3)))
        return self._processor(*args, **kwargs)


def run_with(spec: ParallelSpec, job: Job, path: str, change: str) -> None:
    """Job: a run of the model in which the attention module `path` is changed."""
    dtype, _, method = METHODS["old keys"]
    model = spread_model(spec, groups().rank, **job.model(dtype))
    with contextlib.suppress(AttributeError):  # it is on another stage
        attention = model.module.get_submodule(path)
        if change == "not asked":
            attention.processor = Past(attention.processor)
        elif change == "asked twice":
            attention.processor = Twice(attention.processor)
        else:
            attention.__class__ = type("Unseen", (type(attention),), {"__call__": type(attention).forward})
    message = Sample(job="j", model="m", patches_id="", spec=spec, **job.fields("old keys"), **method)
    with ParallelContext(spec, groups()) as context, torch.inference_mode():
        sample(model, message, message.conds, context, post=lambda entry: None, wish_to_stop=lambda: False)


@pytest.fixture
def ranks():
    with Ranks(2) as started:
        yield started


@pytest.mark.parametrize("kind", ["flux", "sd3.5", "pixart"])
@pytest.mark.parametrize("degrees", SPECS, ids=str)
def test_attention_past_the_engine_is_a_fault_that_names_the_module(ranks, degrees, kind) -> None:
    spec = ParallelSpec(**degrees)
    path = {"flux": "single_transformer_blocks.1.attn", "sd3.5": "transformer_blocks.0.attn2"}.get(
        kind, "transformer_blocks.3.attn1"
    )
    arguments = {"spec": spec, "job": Job.of(kind, spec), "path": path, "change": "not asked"}
    with pytest.raises(AssertionError, match=rf"attention of {path} went past the engine: 0 calls reached it, not 1"):
        ranks.run("run_of", module="test_seam", function="run_with", arguments=arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("not asked", "0 calls reached it, not 1"),
        ("asked twice", "2 calls reached it, not 1"),
        ("not run", "it ran 0 times in a forward"),
    ],
)
def test_attention_past_the_engine_on_one_rank(change, sentence) -> None:
    """With no peer the numbers would be right; but that engine is the one that is tested."""
    spec, path = ParallelSpec(), "single_transformer_blocks.1.attn"
    with pytest.raises(RuntimeError, match=f"attention of {path} went past the engine: {sentence}"):
        run_with(spec, Job.of("flux", spec), path, change)


def run_flux(backend: str, degrees: dict[str, int]) -> Tensor | None:
    """Job: a run where diffusers' environment, and a processor, name another back end than torch's own."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

    spec = ParallelSpec(**degrees)
    job = Job.of("flux", spec)
    model = spread_model(spec, groups().rank, **job.model(torch.float64))
    named = model.module.get_submodule("single_transformer_blocks.1.attn").processor
    named._attention_backend = AttentionBackendName(backend)
    _, _, method = METHODS["exact"]
    message = Sample(job="j", model="m", patches_id="", spec=spec, **job.fields("exact", torch.float64), **method)
    with attention_backend(backend), ParallelContext(spec, groups()) as context, torch.inference_mode():
        out, _ = sample(model, message, message.conds, context, post=lambda entry: None, wish_to_stop=lambda: False)
        assert _AttentionBackendRegistry.get_active_backend()[0] == named._attention_backend == backend
    return out


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}], ids=str)
def test_diffusers_back_end_is_torchs_own_whatever_is_named(ranks, degrees) -> None:
    """`flex` would attend to a rank's own tokens."""
    found = {
        backend: ranks.run(
            "run_of", module="test_seam", function="run_flux", arguments={"backend": backend, "degrees": degrees}
        )[0]
        for backend in ("native", "flex")
    }
    assert torch.equal(found["flex"], found["native"])


def test_a_block_without_attention_is_a_plan_for_another_version() -> None:
    spec = ParallelSpec()
    model = spread_model(spec, 0, **Job.of("flux", spec).model())
    block = model.module.single_transformer_blocks[1]
    block._modules["attention"] = block._modules.pop("attn")
    with (
        ParallelContext(spec, groups()) as context,
        pytest.raises(ValueError, match=r"single_transformer_blocks\.1 of Flux.* has no attention"),
        cut(model.module, model.family.plan, context),
    ):
        pass
