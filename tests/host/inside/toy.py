"""A diffusion model that costs nothing, behind ComfyUI's own guider, model and conditioning code."""

import uuid

import comfy.conds
import comfy.model_base
import comfy.model_sampling as sampling
import comfy.samplers
import torch

KINDS = {
    "flow": (sampling.ModelSamplingDiscreteFlow, sampling.CONST),
    "flux": (sampling.ModelSamplingFlux, sampling.CONST),
    "eps": (sampling.ModelSamplingDiscrete, sampling.EPS),
    "v": (sampling.ModelSamplingDiscrete, sampling.V_PREDICTION),
    "edm": (sampling.ModelSamplingContinuousEDM, sampling.EDM),
}


class Config:
    def __init__(self, kind):
        self.unet_config = {}
        self.sampling_settings = {"shift": 3.0} if kind in ("flow", "flux") else {}


class Network(torch.nn.Module):
    """Mixes channels and bends; its conditioning shifts it. calls: how often it ran.

    Mild: a network that bends more amplifies the rounding of the host's own float32 loop above 1e-6.
    """

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("mix", torch.randn(4, 4, generator=generator) * 0.2)
        self.calls = 0

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **rest):
        self.calls += 1
        shift = context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        time = (timestep / (1 + timestep.abs())).reshape(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.mix, x) + time) + 0.2 * x + shift


class Model(comfy.model_base.BaseModel):
    def __init__(self, kind):
        torch.nn.Module.__init__(self)
        self.model_sampling = type("Sampling", KINDS[kind], {})(Config(kind))
        self.diffusion_model = Network()
        self.manual_cast_dtype = None
        self.memory_usage_factor = 0
        self.memory_usage_factor_conds = ()
        self.memory_usage_shape_process = {}


class Patcher:
    def __init__(self, model, options):
        self.model = model
        self.model_options = options
        self.callbacks = {}
        model.current_patcher = self

    def get_model_object(self, name):
        return getattr(self.model, name)

    def prepare_state(self, *args):
        pass

    def apply_hooks(self, hooks=None):
        return {}

    def get_free_memory(self, device):
        return 1e12

    def is_dynamic(self):
        return False


def cond(value):
    context = comfy.conds.CONDRegular(torch.full((1, 3, 2), value))
    return {"model_conds": {"c_crossattn": context}, "uuid": uuid.uuid4()}


def guider(kind, *, cfg=2.0, cls=comfy.samplers.CFGGuider, conds=("positive", "negative"), **options):
    """A guider as it is inside its `inner_sample`."""
    model = Model(kind)
    made = cls(Patcher(model, {"transformer_options": {}, **options}))
    made.inner_model = model
    made.conds = {name: [cond(0.3 - 0.5 * i)] for i, name in enumerate(conds)}
    made.cfg = cfg
    return made


def sigmas(made, steps, scheduler=None):
    model_sampling = made.inner_model.model_sampling
    flow = isinstance(model_sampling, sampling.CONST)
    name = scheduler or ("simple" if flow else "karras")
    return comfy.samplers.calculate_sigmas(model_sampling, name, steps)


def evaluate(made, program, i, x):
    """What a worker does in call i: the network's output for each conditioning."""
    call = program.calls[i]
    timestep = torch.full((x.shape[0],), call.timestep)
    outputs = []
    for k in call.conds:
        context = made.conds[program.conds[k]][0]["model_conds"]["c_crossattn"].cond
        context = context.expand(x.shape[0], -1, -1)
        outputs.append(made.inner_model.diffusion_model(x, timestep, context=context))
    return outputs
