"""What the names of ComfyUI's model files and nodes say: which family runs a file, and what a pool does with a node."""

from __future__ import annotations

import re

OF_FILES: tuple[tuple[str, str], ...] = (
    (r"minimax_h3", "minimax-h3"),
    (r"ltx-2", "ltx-2"),
    (r"ltx-video|ltxv", "ltxv"),
    (r"z_image_pixel", ""),
    (r"z_image", "z-image"),
    (r"lumina_?2|netayume|newbie", "z-image"),
    (r"wan.*(animate|s2v|humo|scail|dancer)|infinitetalk", ""),
    (r"wan.*vace", "wan-vace"),
    (r"^wan|^phantom", "wan"),
    (r"krea2", "krea2"),
    (r"qwen_image|firered-image-edit", "qwen-image"),
    (r"flux-?2", "flux2"),
    (r"flux1|flux_1|longcat_image", "flux"),
    (r"chroma.*radiance", ""),
    (r"chroma", "chroma"),
    (r"hunyuanvideo1\.5", "hunyuan-video-1.5"),
    (r"hunyuan_video|hunyuanimage2\.1", "hunyuan-video"),
    (r"anima[-_]", "anima"),
    (r"cosmos_predict2", "cosmos"),
    (r"sd3", "sd3"),
    (r"pixart", "pixart"),
)
"""Pattern of a file's name → the family of `comfy_xdit.native.families` that runs it, "" for none. The first counts."""

NOT_DIFFUSION = re.compile(r"sam3|depth_anything|rt_?detr|moge|lotus-depth|upscale", re.I)
"""Files beside the diffusion model that no sampler uses."""

CARRIED = frozenset(
    (
        *("LoraLoader", "LoraLoaderModelOnly", "ComfySwitchNode", "Reroute"),
        *("ModelSamplingAuraFlow", "ModelSamplingFlux", "ModelSamplingLTXV", "ModelSamplingSD3", "ModelNoiseScale"),
        *("APG", "CFGNorm", "CFGOverride", "CFGZeroStar", "DifferentialDiffusion", "Epsilon Scaling", "FreSca"),
        *("EasyCache", "LazyCache", "Mahiro", "RenormCFG", "RescaleCFG", "ModelComputeDtype"),
        *("MiniMaxH3SigmaShift", "XDiTParallelModel"),
    )
)
"""Nodes that change a MODEL, and give stock's latent on a pool; tests/host/inside/check_model_nodes.py tries them."""

CONDITIONS = frozenset(
    (
        *("ConditioningZeroOut", "ConditioningCombine", "ConditioningSetTimestepRange", "ConditioningSetMask"),
        *("ConditioningConcat", "ConditioningAverage", "ComfySwitchNode", "FluxGuidance", "Reroute"),
        *("ReferenceLatent", "FluxKontextMultiReferenceLatentMethod", "InpaintModelConditioning"),
        *("StyleModelApply", "CLIPTextEncodeFlux", "InstructPixToPixConditioning"),
        *("LTXVConditioning", "LTXVCropGuides", "LTXVImgToVideo", "LTXVReferenceAudio"),
        *("WanImageToVideo", "WanFirstLastFrameToVideo", "WanFunInpaintToVideo", "WanFunControlToVideo"),
        *("Wan22FunControlToVideo", "WanCameraImageToVideo", "WanVaceToVideo", "WanTrackToVideo"),
        *("BerniniConditioning",),
    )
)
"""Nodes that change conditioning, in ways that the families take."""


def family_of_file(name: str) -> str | None:
    """The family that runs a file of this name; "" for a known model that none runs, None for an unknown name."""
    return next((family for pattern, family in OF_FILES if re.search(pattern, name, re.I)), None)
