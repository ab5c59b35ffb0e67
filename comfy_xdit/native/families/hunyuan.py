"""HunyuanVideo 1.0 and 1.5, and HunyuanImage 2.1: Flux.1's blocks over a video; 1.5 has no single ones."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily, first_of

from .flux import DOUBLE, TIMED, plan_of

HUNYUAN = ComfyFamily(
    name="hunyuan-video",
    title="HunyuanVideo",
    kinds=("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V", "HunyuanImage21", "HunyuanImage21Refiner"),
    plan=TIMED,
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "y", "guidance", "attention_mask", "guiding_frame_index", "ref_latent", "txt_byt5"),
    constants=("disable_time_r",),
    options=("sigmas", "sample_sigmas"),
    options_need="time_r_in",
    latent=first_of("image", lambda transformer: transformer.patch_size[-1], unless="ref_latent"),
)

HUNYUAN15 = ComfyFamily(
    name="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    kinds=("HunyuanVideo15", "HunyuanVideo15_SR_Distilled"),
    plan=plan_of(DOUBLE, None),
    num_heads=lambda transformer: transformer.num_heads,
    rows=("context", "y", "guidance", "attention_mask", "txt_byt5", "clip_fea"),
    constants=("disable_time_r",),
    options=("sigmas", "sample_sigmas"),
    options_need="time_r_in",
    latent=first_of("image", lambda transformer: transformer.patch_size[-1], unless="ref_latent"),
)
