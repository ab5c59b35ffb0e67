"""What other nodes do to the loop around the transformer works as in stock, bit for bit; the rest is refused."""

import comfy.samplers
import comfy_extras.nodes_differential_diffusion as differential
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_model_advanced as advanced
import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize

import nodes


def apply(node, method, *args, **kwargs):
    """The first output of a stock node, of either kind."""
    if hasattr(node, "define_schema"):
        return node.execute(*args, **kwargs).result[0]
    return getattr(node(), method)(*args, **kwargs)[0]


CHANGES = {
    "shift": ("sd3", lambda model: apply(advanced.ModelSamplingSD3, "patch", model, 5.0)),
    "flux shift": ("flux", lambda model: apply(advanced.ModelSamplingFlux, "patch", model, 1.2, 0.4, 256, 256)),
    "rescale cfg": ("sd3", lambda model: apply(advanced.RescaleCFG, "patch", model, 0.6)),
    "easy cache": ("flux", lambda model: apply(easycache.EasyCacheNode, "patch", model, 0.5, 0.0, 1.0, False)),
    "lazy cache": ("sd3", lambda model: apply(easycache.LazyCacheNode, "patch", model, 0.5, 0.0, 1.0, False)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("before", [True, False])
def test_changes_of_the_loop(name, before, models, fake):
    kind, change = CHANGES[name]
    path = models / f"{kind}.safetensors"
    expected = tiny.sample(change(tiny.load(path)), steps=6)
    ours = parallelize(change(tiny.load(path))) if before else change(from_checkpoint(open_checkpoint(str(path))))
    assert torch.equal(tiny.sample(ours, steps=6), expected)


def test_differential_diffusion(models, fake):
    path = models / "flux.safetensors"
    mask = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).contiguous()
    inputs = {"latent_image": {"samples": torch.ones(1, 16, 16, 16), "noise_mask": mask}, "steps": 5}
    outputs = [
        tiny.sample(apply(differential.DifferentialDiffusion, "apply", model), **inputs)
        for model in (tiny.load(path), from_checkpoint(open_checkpoint(str(path))))
    ]
    assert torch.equal(*outputs)


def test_regions_and_ranges(models, fake):
    """Two areas, a mask and a range of steps: ComfyUI makes several calls a step, of several shapes."""
    left = nodes.ConditioningSetArea().append(tiny.conditioning(seed=20), 64, 128, 0, 0, 1.0)[0]
    late = nodes.ConditioningSetTimestepRange().set_range(tiny.conditioning(27, seed=21), 0.4, 1.0)[0]
    mask = torch.ones(1, 128, 128).tril()
    masked = nodes.ConditioningSetMask().append(tiny.conditioning(seed=22), mask, "default", 0.8)[0]
    positive = tiny.conditioning() + left + late + masked
    path = models / "sd3.safetensors"
    expected = tiny.sample(tiny.load(path), positive=positive, steps=4)
    assert torch.equal(tiny.sample(from_checkpoint(open_checkpoint(str(path))), positive=positive, steps=4), expected)


def test_blocks_replaced_in_mid_run_are_refused_there_at_the_latest(models, fake):
    """By code whose text does not tell: it sets an option of a name that it makes up."""
    model = from_checkpoint(open_checkpoint(str(models / "sd3.safetensors"))).clone()

    def post_cfg_function(args):
        options = dict(args["model_options"])
        made_up = "_".join(("patches", "replace"))
        options["transformer_options"] = options["transformer_options"] | {made_up: {"dit": {0: abs}}}
        return comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)[0]

    model.set_model_sampler_post_cfg_function(post_cfg_function)
    with pytest.raises(ValueError, match="replaced dit of block 0"):
        tiny.sample(model)
