"""Layers whose inputs are scaled by all tokens: no rank that sees a part of them runs them."""

from types import SimpleNamespace

import pytest
from torch import nn

from comfy_xdit.errors import InputError
from comfy_xdit.native.input_scales import require_whole_inputs, scaled_by_all
from comfy_xdit.parallel.spec import ParallelSpec


def layer(**told):
    made = nn.Module()
    for name, value in told.items():
        setattr(made, name, value)
    return made


LAYERS = {
    "by all": layer(quant_format="nvfp4", _full_precision_mm=False),
    "in plain numbers": layer(quant_format="nvfp4", _full_precision_mm=True),
    "with a scale": layer(quant_format="nvfp4", _full_precision_mm=False, input_scale=SimpleNamespace()),
    "fp8": layer(quant_format="float8_e4m3fn", _full_precision_mm=False),
    "plain": nn.Linear(2, 2),
}


def test_they_are_found():
    net = nn.ModuleDict({name.replace(" ", "_"): one for name, one in LAYERS.items()})
    assert scaled_by_all(net) == ["by_all"]


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}, {"distri": 3}, {"cfg": 2, "ulysses": 2}])
def test_they_are_refused_where_tokens_are_cut(degrees):
    with pytest.raises(InputError, match=r"^Krea 2 has 1 layers in nvfp4 .* use cfg, dp or pipe"):
        require_whole_inputs("Krea 2", ["a"], ParallelSpec(**degrees))
    require_whole_inputs("Krea 2", [], ParallelSpec(**degrees))


@pytest.mark.parametrize("degrees", [{}, {"cfg": 2}, {"dp": 3}, {"pipe": 2}])
def test_elsewhere_they_run(degrees):
    require_whole_inputs("Krea 2", ["a"], ParallelSpec(**degrees))
