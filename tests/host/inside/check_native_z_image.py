"""Z-Image from a file of its published width: stock loader, our node, stock sampler; equal to ComfyUI's own run.

ComfyUI's detection knows it by that width, so it can't be tiny: two layers, whose matrices are in fp8, and one text.
"""

import logging

import native_cases as cases
import pytest
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize
from native_cases import error_of

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

PIPE = {"pipe": 2, "warmup_steps": 10_000}
MODES = {"1 rank": (1, {}, 0), "ulysses=2": (2, {"ulysses": 2}, 1e-5), "pipe=2, all exact": (2, PIPE, 0)}


def test_equal_to_stock(tmp_path, pools):
    case = cases.z_image_cases()["z-image"]
    model = case.load(tmp_path / "model.safetensors")
    expected = case.run(model, odd=True, cfg=1.0)
    for mode, (num_ranks, degrees, limit) in MODES.items():
        error = error_of(case.run(parallelize(model, pools(num_ranks, **degrees)), odd=True, cfg=1.0), expected)
        log.info("z-image %s: %.1e", mode, error)
        assert error <= limit
