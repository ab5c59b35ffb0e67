"""The ComfyUI nodes: a thin client of the worker pool.

These files run inside ComfyUI and are the only ones that import it. They hold no weights.
"""

import importlib.util

from comfy_xdit_nodes.conditioning import XDiTLoadConditioning
from comfy_xdit_nodes.load_vae import XDiTLoadVAE
from comfy_xdit_nodes.loader import XDiTLoadDiffusionModel
from comfy_xdit_nodes.parallel_model import XDiTParallelModel
from comfy_xdit_nodes.pool import XDiTWorkerPool
from comfy_xdit_nodes.samplers import XDiTKSampler, XDiTKSamplerAdvanced, XDiTSamplerCustomAdvanced

NODE_CLASS_MAPPINGS = {
    "XDiTWorkerPool": XDiTWorkerPool,
    "XDiTLoadConditioning": XDiTLoadConditioning,
    "XDiTLoadDiffusionModel": XDiTLoadDiffusionModel,
    "XDiTLoadVAE": XDiTLoadVAE,
    "XDiTParallelModel": XDiTParallelModel,
    "XDiTKSampler": XDiTKSampler,
    "XDiTKSamplerAdvanced": XDiTKSamplerAdvanced,
    "XDiTSamplerCustomAdvanced": XDiTSamplerCustomAdvanced,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "XDiTWorkerPool": "Worker Pool (xDiT)",
    "XDiTLoadConditioning": "Load Conditioning (xDiT)",
    "XDiTLoadVAE": "Load VAE (xDiT)",
    "XDiTLoadDiffusionModel": "Load Diffusion Model (xDiT)",
    "XDiTParallelModel": "Parallel Model (xDiT)",
    "XDiTKSampler": "KSampler (xDiT)",
    "XDiTKSamplerAdvanced": "KSampler Advanced (xDiT)",
    "XDiTSamplerCustomAdvanced": "SamplerCustomAdvanced (xDiT)",
}

if importlib.util.find_spec("comfy_xdit_nodes.vae") is not None:
    from comfy_xdit_nodes.vae import XDiTVAEDecode, XDiTVAEEncode

    NODE_CLASS_MAPPINGS |= {"XDiTVAEDecode": XDiTVAEDecode, "XDiTVAEEncode": XDiTVAEEncode}
    NODE_DISPLAY_NAME_MAPPINGS |= {
        "XDiTVAEDecode": "VAE Decode (xDiT)",
        "XDiTVAEEncode": "VAE Encode (xDiT)",
    }
