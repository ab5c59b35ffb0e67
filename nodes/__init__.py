"""The ComfyUI nodes: a thin client of the worker pool.

These files run inside ComfyUI and are the only ones that import it. They hold no weights.
"""

from comfy_xdit_nodes.conditioning import XDiTLoadConditioning
from comfy_xdit_nodes.load_vae import XDiTLoadVAE
from comfy_xdit_nodes.loader import XDiTLoadDiffusionModel
from comfy_xdit_nodes.parallel_model import XDiTParallelModel
from comfy_xdit_nodes.pool import XDiTWorkerPool
from comfy_xdit_nodes.samplers import XDiTKSampler, XDiTKSamplerAdvanced, XDiTSamplerCustomAdvanced
from comfy_xdit_nodes.vae import XDiTVAEDecode, XDiTVAEDecodeTiled, XDiTVAEEncode, XDiTVAEEncodeTiled

NODE_CLASS_MAPPINGS = {
    "XDiTWorkerPool": XDiTWorkerPool,
    "XDiTLoadConditioning": XDiTLoadConditioning,
    "XDiTLoadDiffusionModel": XDiTLoadDiffusionModel,
    "XDiTLoadVAE": XDiTLoadVAE,
    "XDiTParallelModel": XDiTParallelModel,
    "XDiTKSampler": XDiTKSampler,
    "XDiTKSamplerAdvanced": XDiTKSamplerAdvanced,
    "XDiTSamplerCustomAdvanced": XDiTSamplerCustomAdvanced,
    "XDiTVAEDecode": XDiTVAEDecode,
    "XDiTVAEDecodeTiled": XDiTVAEDecodeTiled,
    "XDiTVAEEncode": XDiTVAEEncode,
    "XDiTVAEEncodeTiled": XDiTVAEEncodeTiled,
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
    "XDiTVAEDecode": "VAE Decode (xDiT)",
    "XDiTVAEDecodeTiled": "VAE Decode Tiled (xDiT)",
    "XDiTVAEEncode": "VAE Encode (xDiT)",
    "XDiTVAEEncodeTiled": "VAE Encode Tiled (xDiT)",
}
