"""DistriFusion through ComfyUI's own sampling: near to stock's result, and equal to it where it has to be."""

import pytest
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint, parallelize
from comfy_xdit_nodes.pool import XDiTWorkerPool

STOCK = 1e-4
"""How far an exact run may be from stock; of the latent's norm, in fp32."""

NEAR = 0.2
"""How far a run of few steps with stale keys may be."""


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_distri(kind, sampler, models, pools, caplog):
    caplog.set_level("INFO", "comfy_xdit")
    path = models / f"{kind}.safetensors"
    ours = from_checkpoint(open_checkpoint(str(path)))
    inputs = tiny.fitted(kind, {"sampler_name": sampler, "latent_image": tiny.latent(30, 20)})
    host = tiny.sample(tiny.load(path), **inputs)

    def distance(**settings):
        caplog.clear()
        out = tiny.sample(parallelize(ours, pools(2, distri=2, **settings)), **inputs)
        said = " ".join(record.getMessage() for record in caplog.records)
        return float((out - host).norm() / host.norm()), said

    stale, said = distance()
    assert "(2 ranks, distri=2): " in said and "as a whole on the workers" in said
    assert 10 * STOCK < stale < NEAR
    warm, _ = distance(warmup_steps=3)
    assert warm < stale
    assert distance(warmup_steps=1000)[0] <= STOCK
    step, said = distance(sampling="step")
    assert "; distri waits for fresh keys there, so it is exact" in said
    assert step <= STOCK


def test_the_node_leaves_it_off() -> None:
    """A workflow from before these inputs, and one with their defaults, mean the same."""
    degrees = dict.fromkeys(("dp", "cfg", "pipe", "ring", "ulysses", "tensor"), 0)
    (old,) = XDiTWorkerPool().make(devices="auto", name="default", **degrees)
    optional = XDiTWorkerPool.INPUT_TYPES()["optional"]
    defaults = {name: options[1]["default"] for name, options in optional.items()}
    (new,) = XDiTWorkerPool().make(devices="auto", name="default", **degrees, **defaults)
    assert old == new and new.requested["distri"] == 1
