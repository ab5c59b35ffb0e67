"""ComfyUI's own classes in a worker: one rank computes what the stock loader's MODEL computes, bit for bit."""

import logging
from pathlib import Path

import comfy.sd
import native_models as make
import pytest
import torch
from comfy_xdit_nodes.native.call import as_call
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.native.source import describe
from comfy_xdit_nodes.parity.models import CONTEXT, POOLED
from comfy_xdit_nodes.pool import connect

from comfy_xdit import messages as m
from comfy_xdit.native.input_scales import scaled_by_all
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.errors import PoolError

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

FLUX = {"c_crossattn": (1, 20, CONTEXT), "y": (1, POOLED)}
FAMILIES = {
    "qwen": (make.qwen, (1, 16, 1, 10, 12), {"c_crossattn": (1, 9, 3584)}),
    "wan": (make.wan, (1, 16, 3, 10, 12), {"c_crossattn": (1, 9, 4096)}),
}


@pytest.fixture(scope="module")
def pool(pools):
    made = connect(pools(1))
    with made.lease():
        (answer,) = made.call_all(use_comfy())
        assert answer.value["version"] == use_comfy().version
        yield made


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stock(patcher, latent, conds):
    """The transformer's output in this process, and the call that ComfyUI's model made of it."""
    seen, net = [], patcher.model.diffusion_model
    forward = net.forward

    def noted(*args, **kwargs):
        seen.append(as_call(*args, **kwargs))
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    net.forward = noted
    try:
        named = {name: random(*shape, seed=i + 2) for i, (name, shape) in enumerate(conds.items())}
        patcher.model.apply_model(random(*latent), torch.tensor([0.7]), **named)
    finally:
        del net.forward
    call, output = seen
    return output, call


def on_pool(pool, load, call):
    (status,) = pool.call_all(load)
    message = m.Denoise(model=load.model, patches_id="", spec=ParallelSpec(), calls=[call], chunks=[1])
    return pool.call(message).value[0], status.value


def compare(pool, patcher, latent, conds):
    """The worker's status, after its output was found equal."""
    load = describe(patcher)
    expected, call = stock(patcher, latent, conds)
    assert expected.isfinite().all() and expected.std() > 0
    output, status = on_pool(pool, load, call)
    difference = (output.float() - expected.float()).abs().max().item()
    source = load.source
    log.info("%s %s cast %r: difference %s, %s", source.kind, source.dtype, source.cast, difference, status["bytes"])
    assert torch.equal(output, expected)
    return status


@pytest.mark.parametrize("form", make.FLUX_FORMS)
def test_formats(form, pool, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux(form))
    patcher = comfy.sd.load_diffusion_model(str(path))
    status = compare(pool, patcher, (1, 16, 16, 12), FLUX | {"guidance": (1,)})
    held = status["bytes"]
    # What has the model's dtype in the file is never copied.
    if form == "fp32":
        assert held["private"] == 0 and held["mapped"] > 0
    elif form in ("float8_e4m3fn", "int8_tensorwise", "nvfp4", "mxfp8"):
        assert held["mapped"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dtypes_that_the_user_chose(dtype, pool, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("bf16"))
    patcher = comfy.sd.load_diffusion_model(str(path), {"dtype": dtype})
    status = compare(pool, patcher, (1, 16, 16, 12), FLUX | {"guidance": (1,)})
    assert describe(patcher).storage_dtype == str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        assert status["bytes"]["private"] == 0


def test_a_checkpoint_loaders_model(pool, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("all in one"))
    patcher, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)
    compare(pool, patcher, (1, 16, 16, 12), FLUX | {"guidance": (1,)})


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, pool, tmp_path):
    config, latent, conds = FAMILIES[family]
    path = make.save(tmp_path / f"{family}.safetensors", make.weights(config()))
    compare(pool, comfy.sd.load_diffusion_model(str(path)), latent, conds)


def test_another_model_is_refused_by_name(pool, tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("fp32"))
    load = describe(comfy.sd.load_diffusion_model(str(path)))
    changed = {
        "kind": ("WAN21_T2V", r"flux\.safetensors: .* takes the file for Flux, this one for WAN21_T2V"),
        "config": ("0", r"flux\.safetensors: .* reads other sizes of Flux"),
    }
    for field, (value, sentence) in changed.items():
        source = m.ComfySource(**{**vars(load.source), field: value})
        with pytest.raises(PoolError, match=sentence):
            pool.call_all(m.LoadModel(**{**vars(load), "model": field, "source": source}))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("folder", "/nowhere", "use the classes of another ComfyUI"),
        ("options", {"fast": [], "force_upcast_attention": True}, "with other options"),
    ],
)
def test_a_worker_keeps_its_comfyui(field, value, sentence, pool):
    with pytest.raises(PoolError, match=sentence):
        pool.call_all(m.UseComfy(**{**vars(use_comfy()), field: value}))


def test_a_rank_reads_its_own_part_only(tmp_path):
    from comfy_xdit.native.load import load
    from comfy_xdit.native.resident import plain_tensors

    path = make.save(tmp_path / "flux.safetensors", make.flux("fp32"))
    source = describe(comfy.sd.load_diffusion_model(str(path))).source

    def mine(key, weight):
        if key.startswith("double_blocks.0"):
            return None
        return weight[: weight.shape[0] // 2] if key.startswith("single_blocks.0.linear1") else weight

    model = load(str(path), source, torch.device("cpu"), lambda net: mine).model
    whole = load(str(path), source, torch.device("cpu")).model
    net = model.diffusion_model
    wanted = whole.diffusion_model.single_blocks[0].linear1.weight
    own = net.single_blocks[0].linear1.weight
    assert torch.equal(own, wanted[: wanted.shape[0] // 2])
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split()[0].split("-") for line in lines if str(path) in line]
    assert maps, "the kernel maps the file"
    inside = [range(int(begin, 16), int(end, 16)) for begin, end in maps]
    for key, weight in net.named_parameters():
        is_mapped = all(any(part.data_ptr() in one for one in inside) for part in plain_tensors(weight))
        assert is_mapped == (not key.startswith("double_blocks.0")), key


def test_what_a_call_carries():
    x, time = [random(1, 2), random(1, 3)], (random(1), random(2))
    options = {"cond_or_uncond": [0], "uuids": [object()], "wrappers": {"a": print}, "patches_replace": {}}
    call = as_call(x, time, own=("cond_or_uncond",), context=None, transformer_options=options)
    assert isinstance(call["timestep"], m.Tuple) and call["timestep"].items == list(time)
    assert call["x"] == x and call["transformer_options"] == {"cond_or_uncond": [0]} and "context" not in call
    with pytest.raises(ValueError, match=r"argument 'payload\.inner', a object"):
        as_call(x, time, payload={"inner": object()})
    with pytest.raises(ValueError, match="'mine'"):
        as_call(x, time, transformer_options={"mine": 1})
    assert as_call(x, time, own=("mine",), transformer_options={"mine": 1})["transformer_options"] == {"mine": 1}


def test_a_model_without_a_file_is_not_described(tmp_path):
    path = make.save(tmp_path / "flux.safetensors", make.flux("fp32"))
    patcher = comfy.sd.load_diffusion_model(str(path))
    assert describe(patcher).path == str(path)
    patcher.cached_patcher_init = None
    assert describe(patcher) is None


def test_layers_that_scale_their_inputs_by_all_tokens_are_known(tmp_path):
    """Those of ComfyUI's own, as a card that multiplies in nvfp4 has them, and as this CPU has them."""
    weights = make.quantised(make.weights(make.qwen()), ["nvfp4", "float8_e4m3fn", None])
    net = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "a.safetensors", weights))).model.diffusion_model
    assert scaled_by_all(net) == []
    of_format = {}
    for name, layer in net.named_modules():
        if form := getattr(layer, "quant_format", None):
            layer._full_precision_mm = False
            of_format.setdefault(form, []).append(name)
    assert of_format["float8_e4m3fn"] and scaled_by_all(net) == of_format["nvfp4"]
