"""What degrees of ComfyUI's own classes are chosen by: operations as torch counts them, bytes as workers keep them."""

import logging

import comfy.sd
import native_models as make
import pytest
import torch
from check_native_lora import Worker
from check_native_sample import CASES, random
from check_selftest import KNOWN
from comfy_xdit_nodes import run as nodes_run
from comfy_xdit_nodes.native.header import open_header
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize
from torch.utils.flop_counter import FlopCounterMode

from comfy_xdit.cost import on_pool
from comfy_xdit.cost.links import Device, link_named
from comfy_xdit.native.network import COUNTED, network_of
from comfy_xdit.native.selftest import run
from comfy_xdit.native.subject import build, exists
from comfy_xdit.native.subjects import SUBJECTS
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.stages import block_paths
from comfy_xdit.parallel.whole_shaped import whole_shaped

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

FAR = {"ltx-2": 0.025, "minimax-h3": 0.01}
"""A sound counts as a text, and its attention as the video's; some modulations work for each kind of token."""


def counted(model, plan, call):
    """Operations of the blocks as torch counts them, and how many tokens each stream has."""

    def attention(q, k, v, *args, out_val=None, **kwargs):
        # Shapes, as the counter hands them over.
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    alone = ParallelContext(ParallelSpec(), GroupCache(1))
    counter = FlopCounterMode(display=False, custom_mapping={KERNEL: attention})
    with torch.inference_mode(), whole_shaped(model, plan, alone) as engine, counter:
        run(model, call)
    found, name = counter.get_flop_counts(), type(model).__name__
    return sum(sum(found[f"{name}.{path}"].values()) for path in block_paths(model, plan)), engine.shards.lengths


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "wan-vace"])
def test_operations_are_torchs(name):
    """Of VACE a list of blocks runs once for each hint."""
    family = KNOWN[name]
    subject = next(each for each in SUBJECTS[name] if exists(each.kind))
    config = subject.configured()
    model = build(subject.kind, config)
    call = next(iter(subject.calls(config).values()))
    found = network_of(family, model, family.shape(model), latent_channels=16, kept_bytes=1)
    flops, lengths = counted(model, family.plan, call)
    tokens = {"image": sum(num for stream, num in lengths.items() if stream in COUNTED)}
    tokens["text"] = sum(lengths.values()) - tokens["image"]
    if "text" not in found.cut:
        tokens["text"] = call["context"].shape[1]
    outside = found.outside.linear_flops(tokens)
    ours = found.flops(tokens) - outside
    log.info("%s: %.4f of torch's count", name, ours / flops)
    assert ours == pytest.approx(flops, rel=FAR.get(name, 0))
    assert found.params == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("form", [None, "float8_e4m3fn", "nvfp4"])
def test_parameters_are_priced_as_the_workers_keep_them(form, tmp_path):
    """Loaded or by the header, and not as what they are computed in."""
    weights = make.weights(make.wan())
    path = str(make.save(tmp_path / "wan.safetensors", make.quantised(weights, [form]) if form else weights))
    patcher = comfy.sd.load_diffusion_model(path)
    kept = parallelize(patcher).load_message().param_bytes
    _, checkpoint = open_header(path, dtype=None, fp8=False)
    really = sum(part.nbytes for parts in Worker(patcher).tensors().values() for part in parts)
    log.info("%s: %.3f bytes a parameter, %.3f from the header", form, kept, checkpoint.network.param_bytes)
    assert kept * checkpoint.network.params == pytest.approx(really)
    assert checkpoint.network.param_bytes == pytest.approx(kept, rel=0.01)


def test_degrees_are_chosen_by_cost(tmp_path, monkeypatch):
    """Where a model does not fit, its weights are cut; of a video all frames count."""

    class Pool:
        name, num_ranks = "two cards", 2

    path = make.save(tmp_path / "wan.safetensors", CASES["wan"].weights())
    ours = parallelize(comfy.sd.load_diffusion_model(str(path)))
    load, checkpoint = ours.load_message(), ours.model.checkpoint
    weights = checkpoint.network.params * checkpoint.network.param_bytes

    seen = []
    ranking = on_pool._ranking

    def noted(network, work, *how):
        seen.append(work)
        return ranking(network, work, *how)

    monkeypatch.setattr(on_pool, "_ranking", noted)

    def chosen(memory, frames=3, chunks=1):
        device = Device(name="card", flops_per_s=1e12, memory_bytes=memory)
        monkeypatch.setattr(on_pool, "measure", lambda pool: (link_named("nvlink"), device))
        monkeypatch.setattr(Device, "room_bytes", property(lambda card: card.memory_bytes))
        latent = tuple(random(1, 16, frames, 10, 12).shape)
        return nodes_run.chooser(Pool(), {}, checkpoint, latent=latent, load=load)(chunks)

    assert chosen(1e12).tensor == 1 and chosen(1e12, chunks=2) == ParallelSpec(cfg=2)
    assert chosen(0.9 * weights) == ParallelSpec(tensor=2)
    assert chosen(1.2 * weights).tensor == 1
    chosen(1e12, frames=21)
    assert [work.tokens(checkpoint.network)["image"] for work in seen[-2:]] == [3 * 5 * 6, 21 * 5 * 6]


def test_a_packed_latent_is_known_by_its_first_part():
    assert nodes_run.first_shape(torch.zeros(1, 1, 60), [(1, 2, 3, 4, 5), (1, 8)]) == (1, 2, 3, 4, 5)
    assert nodes_run.first_shape(torch.zeros(1, 4, 8, 8), None) == (1, 4, 8, 8)
