"""PipeFusion of ComfyUI's own classes: what an emulation in ComfyUI's own process gives, whatever the stages are."""

import copy
import dataclasses
import logging

import comfy.sd
import comfy.supported_models
import native_cases as cases
import native_models as make
import pytest
import torch
from check_native_sample import Case, plain, random
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.patcher import parallelize

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

NUM_PATCHES = 3

LIMIT = 1e-5
"""Of the emulation, in fp32: it adds numbers up in another order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where tokens stand in the sequence that attends: text, then the latent's, side by side in pixels, then others."""

    num_text: int
    side: int
    num_after: int = 0

    def places(self, shape):
        """For each patch its rows of pixels and its tokens; then how many tokens there are."""
        frames, height, width = (1, *shape[2:])[-3:]
        rows, columns = (-(-length // self.side) for length in (height, width))
        grid = self.num_text + torch.arange(frames * rows * columns).view(frames, rows, columns)
        text, after = torch.arange(self.num_text), self.num_text + grid.numel() + torch.arange(self.num_after)
        shares = (part.tensor_split(NUM_PATCHES) for part in (text, torch.arange(rows), after))
        found = []
        for before, lines, behind in zip(*shares, strict=True):
            pixels = slice(self.side * int(lines[0]), self.side * int(lines[-1] + 1))
            found.append((pixels, torch.cat([before, grid[:, lines].flatten(), behind])))
        return found, self.num_text + grid.numel() + self.num_after


WAN = Layout(num_text=0, side=2)


def hunyuan():
    config = cases.hunyuan_cases()["hunyuan-video"].config
    return plain(comfy.supported_models.HunyuanVideo(copy.deepcopy(config)))


CASES = {
    # The last row of tokens is half beyond the latent.
    "wan": (lambda: plain(make.wan(num_layers=3)), (1, 16, 3, 9, 12), 4096, {}, WAN),
    "qwen, a reference": (
        lambda: plain(make.qwen()),
        (1, 16, 1, 10, 12),
        3584,
        {"reference_latents": [random(1, 16, 1, 6, 8, seed=5)]},
        Layout(num_text=9, side=2, num_after=12),
    ),
    "krea2": (lambda: plain(make.krea2()), (2, 16, 1, 10, 12), 160, {}, Layout(num_text=9, side=2)),
    "hunyuan-video": (
        hunyuan,
        (1, 16, 3, 6, 8),
        48,
        {"pooled_output": random(1, 768)},
        Layout(num_text=9, side=2),
    ),
    # ComfyUI makes every text 512 tokens long.
    "flux2": (lambda: plain(make.flux2()), (1, 128, 5, 6), 96, {"guidance": 3.5}, Layout(num_text=512, side=1)),
}


class Kept:
    """ComfyUI's attention on whole tensors: keys of the tokens that are computed are new, the others as they were kept.

    Queries of other tokens are computed too, and are of no matter.
    """

    def __init__(self, length):
        self.length, self.kept, self.tokens, self.number = length, {}, None, 0

    def begin(self, tokens):
        """A forward begins, of these tokens of the sequence; None: of all."""
        self.tokens, self.number = tokens, 0

    def __call__(self, func, q, k, v, heads, *args, skip_reshape=False, **more):
        dim = 2 if skip_reshape else 1
        if q.shape[dim] == self.length == k.shape[dim]:
            number, self.number = self.number, self.number + 1
            if self.tokens is None:
                self.kept[number] = k.clone(), v.clone()
            for old, new in zip(self.kept[number], (k, v), strict=True):
                tokens = torch.arange(self.length) if self.tokens is None else self.tokens
                old.index_copy_(dim, tokens, new.index_select(dim, tokens))
            k, v = self.kept[number]
        return func(q, k, v, heads, *args, skip_reshape=skip_reshape, **more)


class Emulation:
    """In place of an evaluation: the first one is exact, in all others patch after patch is computed."""

    def __init__(self, layout):
        self.layout, self.seen = layout, {}

    def __call__(self, apply_model, args):
        x, key = args["input"], tuple(args["cond_or_uncond"])
        patches, length = self.layout.places(x.shape)
        if key not in self.seen:
            kept = Kept(length)
            self.seen[key] = kept, x.clone()
            return self.run(apply_model, args, kept, x)
        kept, given = self.seen[key]
        out = torch.full_like(x, torch.nan)
        for pixels, tokens in patches:
            given[..., pixels, :] = x[..., pixels, :]
            kept.begin(tokens)
            out[..., pixels, :] = self.run(apply_model, args, kept, given.clone())[..., pixels, :]
        return out

    def run(self, apply_model, args, kept, x):
        options = {**args["c"]["transformer_options"], "optimized_attention_override": kept}
        out = apply_model(x, args["timestep"], **{**args["c"], "transformer_options": options})
        assert kept.number, "no attention was found"
        return out


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """`stock(name)`: the case, and its MODEL."""
    made = {}

    def get(name):
        if name not in made:
            weights, shape, channels, more, _ = CASES[name]
            path = tmp_path_factory.mktemp("models") / "model.safetensors"
            case = Case(weights, shape, channels, **more)
            made[name] = case, comfy.sd.load_diffusion_model(str(make.save(path, weights())))
        return made[name]

    return get


def distance(ours, other):
    return ((ours - other).norm() / other.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_patches_equal_the_emulation(name, stock, pools, caplog):
    case, model = stock(name)
    emulated = model.clone()
    emulated.set_model_unet_function_wrapper(Emulation(CASES[name][-1]))
    expected, exact = case.run(emulated, steps=4), case.run(model, steps=4)
    with caplog.at_level("INFO", "comfy_xdit"):
        two = case.run(parallelize(model, pools(2, pipe=2, num_patches=NUM_PATCHES)), steps=4)
    assert "as a whole on the workers" in caplog.text and "runs empty" not in caplog.text
    error, drift = distance(two, expected), distance(expected, exact)
    log.warning("%s: %.1e from the emulation, which is %.1e from the exact result", name, error, drift)
    assert error <= LIMIT and 5 * LIMIT < drift < 0.3
    if not name.startswith("qwen"):  # whose file has two blocks
        three = case.run(parallelize(model, pools(3, pipe=3, num_patches=NUM_PATCHES)), steps=4)
        assert torch.equal(two, three), "the number of stages is no matter"


@pytest.mark.parametrize("beside", ["cfg", "ulysses", "tensor"])
def test_beside_other_methods(beside, stock, pools):
    case, model = stock("wan")
    emulated = model.clone()
    emulated.set_model_unet_function_wrapper(Emulation(CASES["wan"][-1]))
    ours = parallelize(model, pools(4, **{"pipe": 2, beside: 2, "num_patches": NUM_PATCHES}))
    assert distance(case.run(ours, steps=4), case.run(emulated, steps=4)) <= LIMIT


@pytest.mark.parametrize("name", CASES)
def test_where_all_is_warm_up_it_is_one_ranks_result(name, stock, pools):
    case, model = stock(name)
    ours = case.run(parallelize(model, pools(2, pipe=2, warmup_steps=10_000)), cfg=1.0)
    one = case.run(parallelize(model, pools(1)), cfg=1.0)
    assert torch.equal(ours, one) if len(one) == 1 else distance(ours, one) <= LIMIT


def test_a_latent_that_has_no_patches_is_exact_and_the_log_says_so(pools, tmp_path, caplog):
    """Of Wan with a reference."""
    weights = plain(make.wan("WAN21_FunControl2V", model_type="i2v", in_dim=48, in_dim_ref_conv=16))
    shape = (1, 16, 3, 10, 12)
    case = Case(weights, shape, 4096, reference_latents=[random(1, 16, 1, 10, 12, seed=5)])
    model = comfy.sd.load_diffusion_model(str(make.save(tmp_path / "wan.safetensors", weights)))
    with caplog.at_level("INFO", "comfy_xdit"):
        ours = case.run(parallelize(model, pools(2, pipe=2, num_patches=NUM_PATCHES)))
    assert distance(ours, case.run(model)) <= LIMIT
    assert "the pipeline of 2 stages runs empty after every evaluation there, so it is exact" in caplog.text
