"""VAEs of ComfyUI's classes at their own sizes, with random weights: what ComfyUI makes of a file of each."""

import json

import comfy.ldm.cogvideo.vae
import comfy.ldm.genmo.vae.model
import comfy.ldm.lightricks.vae.causal_video_autoencoder as lightricks
import comfy.ldm.models.autoencoder as autoencoder
import comfy.ldm.wan.vae2_2
import comfy.taesd.taehv

LDM = {
    **{"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4]},
    **{"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
}


def ldm(channels, **more):
    return autoencoder.AutoencoderKL(embed_dim=channels, ddconfig={**LDM, "z_channels": channels, **more})


def wan22():
    stages = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    return comfy.ldm.wan.vae2_2.WanVAE(dim=160, z_dim=48, attn_scales=[], dropout=0.0, **stages)


def causal_ltx():
    """One that the settings in its file change where weights don't show it."""
    config = lightricks.VideoVAE().config
    return lightricks.VideoVAE(config={**config, "causal_decoder": not config.get("causal_decoder", False)})


CLASSES = {
    "flux2": lambda: ldm(32, batch_norm_latent=True),
    "hunyuan": lambda: ldm(16, conv3d=True, time_compress=4),
    "wan22": wan22,
    "ltx": lightricks.VideoVAE,
    "ltx-causal": causal_ltx,
    "mochi": comfy.ldm.genmo.vae.model.VideoVAE,
    "cogvideo": lambda: comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX(latent_channels=16),
    "taehv": lambda: comfy.taesd.taehv.TAEHV(latent_channels=16),
}


def file_of(name):
    """Its weights, and the notes in the file's header."""
    model = CLASSES[name]()
    notes = {"config": json.dumps({"vae": model.config})} if name == "ltx-causal" else None
    return model.state_dict(), notes
