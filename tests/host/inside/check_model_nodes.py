"""Every node of ComfyUI's own that changes a MODEL: the pool gives stock's latent with it, or refuses it by name."""

import asyncio
import inspect
import logging

import native_models as make
import pytest
import torch
from check_native_sample import CASES, LIMIT
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize

import nodes
from comfy_xdit.templates.names import CARRIED

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

MODELS = ("wan", "qwen")
PLAIN = {"INT": 1, "FLOAT": 1.0, "BOOLEAN": True, "STRING": ""}
OF_OTHERS = ("ModelMerge", "FreeU", "HyperTile", "Tomesd", "TokenMerging", "PerturbedAttention_", "TorchCompile")
"""Of UNets, of other models' layers, or compilers."""
OF_ONE_MODEL = {"MiniMaxH3SigmaShift"}
SHARE = 0.7
"""Of a number's default that is taken: a default often changes nothing."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """`stock(name)`: the MODEL of a case, and its latent."""
    return make.loaded_once(CASES, tmp_path_factory)


def model_nodes():
    """Name → class of all that take a MODEL and give one, and for the rest take what a user types."""
    asyncio.run(nodes.init_builtin_extra_nodes())
    found = {}
    for name, cls in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
        if "comfy_api_nodes" in cls.__module__ or "comfy_xdit" in cls.__module__ or name.startswith(OF_OTHERS):
            continue
        given = given_by_hand(cls)
        returned = list(cls.RETURN_TYPES or ())
        if given is not None and returned[:1] == ["MODEL"]:
            found[name] = cls, given
    return found


def given_by_hand(cls):
    """Its inputs at their defaults, but for the MODEL; None where it needs what another node makes."""
    values, has_model = {}, False
    for name, (kind, *more) in cls.INPUT_TYPES().get("required", {}).items():
        options = more[0] if more else {}
        if kind == "MODEL":
            has_model = True
            values[name] = None
        elif isinstance(kind, (list, tuple)) or kind == "COMBO":
            choices = list(kind) if isinstance(kind, (list, tuple)) else options.get("options", [])
            if not choices and "default" not in options:
                return None
            values[name] = options.get("default", choices[0] if choices else None)
        elif kind == "FLOAT":
            number = SHARE * (options.get("default", 1.0) or 0.5)
            values[name] = min(max(number, options.get("min", number)), options.get("max", number))
        elif kind in PLAIN:
            values[name] = options.get("default", PLAIN[kind])
        else:
            return None
    return values if has_model else None


def changed(cls, given, model):
    """The node's MODEL."""
    inputs = {name: model if value is None else value for name, value in given.items()}
    made = getattr(cls(), cls.FUNCTION)(**inputs)
    if inspect.isawaitable(made):
        made = asyncio.run(made)
    made = getattr(made, "result", made)
    return made[0]


def outcome(cls, given, name, stock, pools):
    """What the pool does with the node on a model, in a word or a sentence."""
    model, plain = stock(name)
    case = CASES[name]
    try:
        patched = changed(cls, given, model)
        expected = case.run(patched)
    except Exception as error:
        return f"stock fails: {type(error).__name__}"
    try:
        ours = case.run(parallelize(patched, pools(2, ulysses=2)))
    except ValueError as error:
        assert "\n" not in str(error)
        return f"refused: {error}"
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert error <= LIMIT[False], f"another latent, by {error:.1e}"
    return f"equal ({error:.0e}){'' if not torch.equal(expected, plain) else ', changes nothing here'}"


NODES = model_nodes() if use_comfy() is not None else {}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("node", NODES)
def test_every_node(node, name, stock, pools):
    found = outcome(*NODES[node], name, stock, pools)
    log.info("%s on %s: %s", node, name, found)
    # What is offered for templates is not refused here, but for what belongs to another model.
    assert node not in CARRIED - OF_ONE_MODEL or found.startswith(("equal", "stock fails"))


def test_there_are_many():
    assert len(NODES) > 20
