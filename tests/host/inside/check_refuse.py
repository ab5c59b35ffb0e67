"""What would run inside the transformer is refused by name, before anything is sent."""

import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.pool import PoolSetting


@pytest.fixture
def model(models):
    return from_checkpoint(open_checkpoint(str(models / "sd3.safetensors")))


def my_patch(*args, **kwargs):
    raise AssertionError("it must never run")


CHANGES = {
    "block patch 'attn1_patch' (HERE.my_patch)": lambda m: m.set_model_attn1_patch(my_patch),
    "replaced dit of block double_block 0 (HERE.my_patch)": lambda m: m.set_model_patch_replace(
        my_patch, "dit", "double_block", 0
    ),
    "replaced attention (HERE.my_patch)": lambda m: m.model_options["transformer_options"].update(
        optimized_attention_override=my_patch
    ),
    "transformer option 'rope_options' (node \"ScaleROPE\")": lambda m: m.model_options["transformer_options"].update(
        rope_options={"scale_x": 2.0}
    ),
    "transformer option 'kept' (HERE.Kept)": lambda m: m.model_options["transformer_options"].update(kept=Kept()),
    "transformer option 'gate'": lambda m: m.model_options["transformer_options"].update(gate=torch.ones(3)),
    "transformer option 'easycache' (HERE.Kept)": lambda m: m.model_options["transformer_options"].update(
        easycache=Kept()
    ),
    "transformer option 'blocks'": lambda m: m.model_options["transformer_options"].update(blocks=[1, 2]),
    "object patch 'diffusion_model.final_layer' (HERE.my_patch)": lambda m: m.add_object_patch(
        "diffusion_model.final_layer", my_patch
    ),
    "weight wrapper on 'diffusion_model.x' (HERE.my_patch)": lambda m: m.add_weight_wrapper(
        "diffusion_model.x", my_patch
    ),
    "injection 'theirs' (HERE.Injection)": lambda m: m.set_injections("theirs", [Injection()]),
    "load callback (HERE.my_patch)": lambda m: m.add_callback("on_load_after", my_patch),
}


class Kept:
    """As EasyCache's own state is: it can be cloned, and a transformer could read it."""

    def clone(self):
        return self


class Injection:
    def inject(self, patcher):
        """ComfyUI injects before the run's wrappers are asked."""

    eject = inject

CHANGES = {sentence.replace("HERE", __name__): change for sentence, change in CHANGES.items()}


@pytest.mark.parametrize("sentence", CHANGES)
def test_changes_of_the_model(sentence, model, fake):
    changed = model.clone()
    CHANGES[sentence](changed)
    with pytest.raises(ValueError) as refused:
        tiny.sample(changed)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert not fake.log
    assert tiny.sample(model).isfinite().all()


def test_all_at_once(model, fake):
    changed = model.clone()
    for change in CHANGES.values():
        change(changed)
    with pytest.raises(ValueError) as refused:
        tiny.sample(changed)
    assert all(sentence in str(refused.value) for sentence in CHANGES)


def test_conditioning(model, fake):
    import comfy.controlnet

    control = comfy.controlnet.ControlBase()
    cases = {
        "a ControlNet (node \"Apply ControlNet\")": {"control": control, "control_apply_to_uncond": True},
    }
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0))
    group.hooks[0].weights = {}
    group.hooks[0].need_weight_init = False
    cases["a weight hook (node \"Create Hook LoRA\")"] = {"hooks": group}
    options = comfy.hooks.HookGroup()
    options.add(comfy.hooks.TransformerOptionsHook(transformers_dict={"patches": {"attn1_patch": [my_patch]}}))
    cases[f"the block patch 'attn1_patch' ({__name__}.my_patch)"] = {"hooks": options}
    for sentence, extra in cases.items():
        with pytest.raises(ValueError) as refused:
            tiny.sample(model, positive=tiny.conditioning(**extra))
        assert sentence in str(refused.value)
    assert not fake.log


def test_degrees_that_do_not_fit(model, fake):
    fake.num_ranks = 4
    with pytest.raises(ValueError, match=r"product divides 4"):
        tiny.sample(parallelize(model, PoolSetting(ulysses=3)))
    with pytest.raises(ValueError, match=r"cfg=4 is more than cond and uncond"):
        tiny.sample(parallelize(model, PoolSetting(cfg=4)))
    assert not fake.log


def test_calls_outside_of_a_sampler(model):
    import torch

    with pytest.raises(ValueError, match="outside of a sampler"):
        model.model.diffusion_model(torch.zeros(1, 16, 4, 4), torch.zeros(1), context=torch.zeros(1, 2, 64))


def test_saving(model):
    with pytest.raises(ValueError, match="in front of Parallel Model"):
        model.model.state_dict_for_saving()
