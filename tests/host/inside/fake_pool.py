"""A pool inside the process: ComfyUI's own model answers, so results must be equal bit for bit."""

import contextlib

import comfy.utils
import comfy.weight_adapter as adapters
import torch
from comfy_xdit_nodes.parity import models as tiny

from comfy_xdit import messages as m
from comfy_xdit.weights.stamp import stamp

ADAPTERS = {cls.name: cls for cls in adapters.adapters} | {adapters.BOFTAdapter.name: adapters.BOFTAdapter}


class FakePool:
    """One rank. log: the kinds of the messages; every message goes through its wire form.

    memory: what its status tells of the device.
    """

    name, devices, num_ranks, generation, network = "fake", ["cpu"], 1, 1, None

    def __init__(self):
        self.models, self.held, self.log, self.calls = {}, {}, [], []
        self.leases = 0
        self.memory = {}

    @contextlib.contextmanager
    def lease(self, poll=None):
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1
            if not self.leases:
                self.held.clear()

    def call(self, message, *, poll=None, timeout_s=None):
        message = m.decode(*m.encode(message))
        self.log.append(type(message).__name__)
        if poll is not None:
            poll()
        return m.Result(value=getattr(self, "on_" + type(message).__name__)(message))

    def call_all(self, message, *, poll=None, timeout_s=None):
        return [self.call(message, poll=poll, timeout_s=timeout_s)]

    def status(self):
        held = {"models": [{"model": key} for key in self.models], "vaes": []}
        return {"ranks": [{"rank": i, "device": d, **held, **self.memory} for i, d in enumerate(self.devices)]}

    def on_LoadModel(self, message):
        self.loaded = message
        assert message.stamp == stamp(message.path), "a worker refuses it"
        if message.model not in self.models or self.models[message.model].xdit_stamp != message.stamp:
            storage, compute = (getattr(torch, n) for n in (message.storage_dtype, message.compute_dtype))
            patcher = tiny.load(message.path, storage, compute)
            patcher.xdit_patches_id, patcher.xdit_stamp = "", message.stamp
            self.models[message.model] = patcher
        return {"patches_id": self.models[message.model].xdit_patches_id}

    def on_SetPatches(self, message):
        patcher = self.models[message.model]
        patcher.unpatch_model(torch.device("cpu"))
        patcher.patches = {}
        for patch in message.patches:
            value = comfy_value(patch)
            key = "diffusion_model." + patch.key
            if key not in patcher.model.state_dict():
                key = key.removesuffix("scale") + "weight"
            function = getattr(comfy.utils, patch.function) if patch.function else None
            offset = tuple(patch.offset) if patch.offset else None
            entry = (patch.strength, value, patch.strength_model, offset, function)
            patcher.patches.setdefault(key, []).append(entry)
        patcher.patch_model(torch.device("cpu"))
        patcher.xdit_patches_id = message.patches_id
        return {"changed": len(message.patches), "misfits": []}

    def on_Hold(self, message):
        self.held[message.name] = message.value

    def on_Drop(self, message):
        for name in message.names:
            del self.held[name]

    def on_Unload(self, message):
        for key in message.keys or list(self.models):
            self.models.pop(key, None)

    def on_Probe(self, message):
        return {"flops_per_s": 1e12, "memory_bytes": 1e10, "bytes_per_s": {"send": 1e9}, "latency_s": {"send": 1e-5}}

    def on_Denoise(self, message):
        patcher = self.models[message.model]
        assert patcher.xdit_patches_id == message.patches_id
        self.calls.append((len(message.calls), message.chunks, message.spec))
        outputs = []
        for call in message.calls:
            call = {name: self.recall(value) for name, value in call.items()}
            x, timestep = call.pop("x"), call.pop("timestep")
            with torch.inference_mode():
                outputs.append(patcher.model.diffusion_model(x, timestep, **call))
        return outputs

    def recall(self, value):
        if isinstance(value, list):
            return [self.recall(item) for item in value]
        return self.held[value.name] if isinstance(value, m.Held) else value


def comfy_value(patch):
    if patch.kind in ADAPTERS:
        return ADAPTERS[patch.kind](set(), tuple(patch.weights))
    return tuple(patch.weights) if patch.kind == "diff" else ("set", tuple(patch.weights))
