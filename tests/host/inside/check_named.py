"""Sentences name the node that a change came from, wherever its code lies, and no path of the machine."""

import functools
import importlib.util
import sys

import comfy.controlnet
import comfy.hooks
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_model_patch as model_patch
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_slg as slg
import folder_paths
import pytest
from check_loop import apply
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.named import name_of
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint

import nodes

PACK = '''
import functools

class Made:
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def go(self, model):
        def patch(*args, **kwargs):
            return args
        return patch

class Patch:
    def __call__(self, *args):
        return args

    def inject(self, patcher):
        return None

def free(*args):
    return args

NODES = {}
for i in range(3):
    NODES[i] = type(f"Other{i}", (Made,), {"__module__": __name__})
'''


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """A custom node pack as ComfyUI loads it: the module's name is its path."""
    folder = tmp_path / "custom_nodes" / "some-pack"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACK)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(folder.parent)], set()))
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "SomeMade", module.Made)
    monkeypatch.setitem(nodes.NODE_DISPLAY_NAME_MAPPINGS, "SomeMade", "Made by Hand")
    return module


def test_code_of_a_pack(pack):
    assert name_of(pack.Made().go(None)) == 'node "Made by Hand"'
    assert name_of(functools.partial(pack.Made().go(None), 1)) == 'node "Made by Hand"'
    # Only one node in sight.
    assert name_of(pack.free) == name_of(pack.Patch()) == name_of(pack.Patch().inject) == 'node "Made by Hand"'
    for i, made in pack.NODES.items():
        setattr(pack, f"Other{i}", made)
    assert name_of(pack.free) == name_of(pack.Patch()) == 'a node of "some-pack"'


def test_code_of_comfyui():
    assert name_of(comfy.controlnet.ControlBase()) == 'node "Apply ControlNet"'
    assert name_of(comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)) == 'node "Create Hook LoRA"'
    assert name_of(easycache.easycache_sample_wrapper) == 'node "EasyCache" or "LazyCache"'
    assert name_of(easycache.EasyCacheHolder) == 'node "EasyCache"'
    assert name_of(model_patch.UsoStyleProjectorPatch) == 'node "USOStyleReference"'


@pytest.fixture
def model(models):
    return from_checkpoint(open_checkpoint(str(models / "sd3.safetensors")))


def attention_backend(model):
    import comfy.ldm.modules.attention as attention

    model = model.clone()
    model.set_model_optimized_attention(attention.attention_pytorch)
    return model


CHANGES = {
    'the blocks that are replaced in some steps (node "SkipLayerGuidanceDiT")': lambda model: apply(
        slg.SkipLayerGuidanceDiT, "", model, 3.0, 0.3, 0.6, "0", "1"
    ),
    'the blocks that are replaced in some steps (node "SkipLayerGuidanceDiTSimple")': lambda model: apply(
        slg.SkipLayerGuidanceDiTSimple, "", model, 0.3, 0.6, "0", "1"
    ),
    'the blocks that are replaced in some steps (node "PerturbedAttentionGuidance")': lambda model: apply(
        pag.PerturbedAttentionGuidance, "patch", model, 3.0
    ),
    'the replaced attention (node "ModelAttentionBackend")': attention_backend,
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_what_is_refused_before_the_first_step_names_its_node(sentence, model, fake):
    """Also where it would act in some of the steps only: a part of the range is not in this run's first step."""
    if "ModelAttentionBackend" in sentence and not hasattr(model, "set_model_optimized_attention"):
        pytest.skip("this ComfyUI has no such node")
    changed = CHANGES[sentence](model)
    with pytest.raises(ValueError) as refused:
        tiny.sample(changed)
    assert f"can't run {sentence}; remove that node" in str(refused.value) and "/" not in str(refused.value)
    assert not fake.log, "a worker was touched"
