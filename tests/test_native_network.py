"""What the cost model takes from a plan and a module: operations as torch counts them, bytes as ranks send them."""

import dataclasses

import test_sharded
import token_toys
import torch
from torch.utils.flop_counter import FlopCounterMode

from comfy_xdit.cost.choose import predictions
from comfy_xdit.cost.formulas import sent
from comfy_xdit.cost.links import Device, link_named
from comfy_xdit.cost.memory import memory
from comfy_xdit.cost.work import Work
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.native.network import network_of
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.stages import block_costs
from comfy_xdit.parallel.thread_ranks import on_threads

DOUBLES, SINGLES = token_toys.JOINT.blocks
TOYS = {
    "joint": (
        token_toys.toy_model("joint"),
        dataclasses.replace(token_toys.JOINT, blocks=(dataclasses.replace(DOUBLES, light=("text.",)), SINGLES)),
        {**token_toys.call("joint"), "options": None},
        {"image": 11, "text": 5},
    ),
    "one stream": (
        test_sharded.model(),
        dataclasses.replace(
            test_sharded.PLAN,
            blocks=(dataclasses.replace(test_sharded.PLAN.blocks[0], once=("modulation.",)),),
        ),
        {**test_sharded.call(), "transformer_options": {}},
        {"image": 7, "text": 0},
    ),
}


def network(module, plan, **more):
    family = ComfyFamily(name="toy", title="Toy", kinds=("Toy",), plan=plan, num_heads=lambda toy: 8, rows=(), **more)
    kept = sum(weight.nbytes for weight in module.parameters())
    return network_of(family, module, family.shape(module), latent_channels=4, kept_bytes=kept)


def counted(module, call):
    def attention(q, k, v, *args, out_val=None, **kwargs):
        # Shapes, as the counter hands them over.
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    kernels = torch.ops.aten
    found = (kernels._scaled_dot_product_flash_attention_for_cpu, kernels._scaled_dot_product_attention_math)
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(found, attention)) as counter:
        module(**call)
    return counter


def test_operations_are_torchs():
    module, plan, call, tokens = TOYS["one stream"]
    found = network(module, plan)
    blocks = dataclasses.replace(found, outside=dataclasses.replace(found.outside, multiplied={}))
    counts = counted(module, call).get_flop_counts()
    inside = [path for blocks in plan.blocks for path in counts if path.split(".")[1:-1] == [blocks.path]]
    # The toys' calls are of two rows.
    assert 2 * blocks.flops(tokens) == sum(sum(counts[path].values()) for path in inside) > 0
    assert found.params == sum(weight.numel() for weight in module.parameters())
    assert (found.param_bytes, found.hidden, found.head_dim) == (8, test_sharded.WIDTH, test_sharded.DIM)


def test_bytes_between_ranks_are_what_ranks_send():
    module, plan, _, _ = TOYS["one stream"]
    found, work = network(module, plan), Work(latent=(1, 7), text_tokens=0, images=2, element_bytes=8)
    for degrees in ({"ulysses": 2}, {"ring": 3}, {"tensor": 2}):
        spec = ParallelSpec(**degrees)
        outs = on_threads(spec, lambda context: test_sharded.sent_by(context, plan, module))
        for rank, really in enumerate(outs):
            assert sent(found, work, spec, rank) == really


def test_a_video_is_as_many_tokens_as_its_frames_make():
    module, plan, _, _ = TOYS["one stream"]
    found = network(module, plan, patch=lambda toy: (2, 3, 3), text_tokens=9)
    work = Work(latent=(6, 7), frames=5, text_tokens=found.text_tokens)
    assert work.tokens(found) == {"image": 3 * 2 * 3, "text": 9}
    one = dataclasses.replace(work, frames=1)
    assert memory(found, work, ParallelSpec(), 0).activations > memory(found, one, ParallelSpec(), 0).activations


def test_the_plan_of_a_model_of_comfyuis_own():
    """All methods that there are for it; where it does not fit, its weights are cut."""
    module, plan, _, _ = TOYS["one stream"]
    found, work = network(module, plan), Work(latent=(16, 16), text_tokens=9)
    whole = memory(found, work, ParallelSpec(), 0)
    gpu, link = Device(name="gpu", flops_per_s=1e12, memory_bytes=10**12), link_named("nvlink")
    specs = {str(each.spec) for each in predictions(found, work, 2, link, gpu)}
    assert specs == {"dp=2", "distri=2", "ring=2", "ulysses=2", "pipe=2", "tensor=2"}
    assert memory(found, work, ParallelSpec(tensor=2), 0).parameters < 0.52 * whole.parameters
    assert whole.parameters == 8 * found.params


def test_stages_share_out_what_the_network_says():
    module, plan, _, _ = TOYS["joint"]
    doubles, _, singles, _ = block_costs(module, plan)
    found = network(module, plan)
    elements = [block.multiplied for block in found.blocks]
    ratio = 16
    image = {number: sum(num for streams, num in elements[number].items() if "image" in streams) for number in (0, 2)}
    assert doubles - singles == ratio * (image[0] - image[2]) + elements[0][("text",)]
