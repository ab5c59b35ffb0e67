"""Messages survive the wire, and nothing but a message comes out of it."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit import messages as m
from comfy_xdit.encoding import KINDS
from comfy_xdit.parallel.spec import ParallelSpec

plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
keys = st.text(max_size=6).filter(lambda key: not key.startswith("$"))
trees = st.recursive(plain, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=3), max_leaves=8)


@given(trees)
def test_a_tree_comes_back_as_it_went(tree):
    assert m.decode(*m.encode(m.Hold(name="a", value=tree))) == m.Hold(name="a", value=tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_tensors_and_nested_messages(dtype):
    sent = m.Denoise(
        model="k", patches_id="p", spec=ParallelSpec(cfg=2, ring=3), chunks=[2],
        calls=[{"x": torch.arange(6).reshape(2, 3).to(dtype), "context": m.Held(name="c")}],
    )
    got = m.decode(*m.encode(sent))
    assert got.spec == sent.spec and got.calls[0]["context"] == m.Held(name="c")
    assert got.calls[0]["x"].dtype == dtype
    assert torch.equal(got.calls[0]["x"].float(), sent.calls[0]["x"].float())


def test_a_parameter_travels_as_a_plain_tensor():
    _, tensors = m.encode(m.Hold(name="w", value=torch.nn.Parameter(torch.ones(2))))
    assert type(tensors[0]) is torch.Tensor and not tensors[0].requires_grad


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", '{"$": "os.system"}', '{"$": ["x"]}', '{"$": "Hold", "name": "a"}',
        '{"$": "Hold", "name": "a", "value": 1, "extra": 2}', '{"$": "ParallelSpec"}',
        '{"$": "Hold", "name": "a", "value": {"$tensor": 0}}', '{"$": "Hold", "name": "a", "value": {"$tensor": -1}}',
        '{"$": "LoadModel", "model": "", "path": "", "prefix": "", "family": "", "storage_dtype": "", '
        '"compute_dtype": "", "spec": {"$": "ParallelSpec", "dp": 0}}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused_with_a_value_error(text):
    with pytest.raises(ValueError):
        m.decode(text, [])


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ValueError, match="other than a tensor"):
        m.decode('{"$": "Status"}', ["x"])
    with pytest.raises(TypeError, match="cannot carry"):
        m.encode(m.Hold(name="a", value=object()))


def test_every_message_is_in_the_one_registry_and_no_name_is_taken_twice():
    said = {name: kind for name, kind in vars(m).items() if isinstance(kind, type) and issubclass(kind, m.Message)}
    assert len(said) > 15 and said.items() - {"Message": m.Message}.items() <= KINDS.items()
    with pytest.raises(AssertionError, match="has a message Hold too"):
        type("Hold", (m.Message,), {"__module__": "elsewhere"})
    assert KINDS["Hold"] is m.Hold


def test_tensors_go_with_the_last_reference():
    # Not when the collector comes: until then a worker would keep what each message brought.
    gc.collect()
    gc.disable()
    try:
        sent, brought = torch.ones(3), torch.ones(3)
        text, _ = m.encode(m.Result(value=sent))
        m.decode(text, [brought])
        gone = [weakref.ref(sent), weakref.ref(brought)]
        del sent, brought, _
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
