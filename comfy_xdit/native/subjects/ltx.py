"""LTX-Video and LTX-2."""

from __future__ import annotations

import torch

from comfy_xdit.native.subject import Call, Config, Subject, padded, rand, times

FRAMES = torch.tensor([0.0, 0.7, 0.7]).repeat_interleave(35)[None]
"""A timestep for each token, alike in a frame, of 3 · 5 · 7 tokens."""
KEYFRAMES = {"tokens_per_frame": 35, "first_latent_frame": 1, "num_keyframes": 1}
SPOTS = torch.rand(1, 105, generator=torch.Generator().manual_seed(1))


def guides(strength: float) -> Call:
    """Two frames at the end that are shown, of which the second is not to be computed."""
    mask = torch.ones(1, 1, 5, 5, 7)
    mask[:, :, 4] = -1
    steps = 0.7 * torch.ones(1, 175)
    shown = {"keyframe_idxs": rand(1, 3, 70, 2).abs(), "denoise_mask": mask, "timestep": steps}
    entry = {"pre_filter_count": 70, "strength": strength, "pixel_mask": None, "latent_shape": [2, 5, 7]}
    return {**shown, "guide_attention_entries": [entry]}


def video_calls(config: Config) -> dict[str, Call]:
    def base(batch: int, frames: int = 3) -> Call:
        call = {"x": rand(batch, config["in_channels"], frames, 5, 7), "timestep": times(0.7, 0.3)[:batch]}
        return {**call, "context": rand(batch, 9, config["caption_channels"]), "attention_mask": None}

    one = base(1)
    return {
        "text": one,
        "batch 2, padded": {**base(2), "attention_mask": padded(2, 9)},
        "another frame rate": {**one, "frame_rate": 12},
        "a timestep for each frame": {**one, "timestep": FRAMES, "denoise_mask": torch.ones(1, 1, 3, 5, 7)},
        "a timestep for each token": {**one, "timestep": SPOTS},
        "guides": {**base(1, 5), **guides(1.0)},
        "keyframes that are made": {**one, "generated_keyframes": KEYFRAMES},
    }


def weak_guides(config: Config) -> dict[str, Call]:
    """Calls that a plan refuses."""
    calls = sound_calls(config) if config["image_model"] == "ltxav" else video_calls(config)
    call = calls["guides"]
    return {"weak guides": {**call, "guide_attention_entries": guides(0.5)["guide_attention_entries"]}}


def sound_calls(config: Config) -> dict[str, Call]:
    channels, text = config["in_channels"], 2 * config["caption_channels"]
    if config.get("caption_proj_before_connector"):
        text = config["cross_attention_dim"] + config["audio_cross_attention_dim"]

    def base(batch: int, frames: int = 3) -> Call:
        x = [rand(batch, channels, frames, 5, 7), rand(batch, 8, 11, 16)]
        # Its code takes the latest of the rows' times for all; a sampler gives them one.
        return {"x": x, "timestep": times(0.7).expand(batch), "context": rand(batch, 9, text), "attention_mask": None}

    one, time = base(1), times(0.7)
    spotted = torch.ones(1, 1, 3, 5, 7)
    spotted[..., 2:4] = 0
    sound = {"audio_denoise_mask": torch.ones(1, 1, 11, 1), "denoise_mask": torch.ones(1, 1, 3, 5, 7)}
    shown = guides(1.0)
    return {
        "text": one,
        "batch 2, padded": {**base(2), "attention_mask": padded(2, 9)},
        "another frame rate": {**one, "frame_rate": 12},
        "a timestep for each frame": {**one, **sound, "timestep": (FRAMES, rand(1, 11).abs())},
        "a timestep for each token": {**one, "denoise_mask": spotted, "timestep": (SPOTS, time)},
        "a voice": {**one, "ref_audio": {"tokens": rand(1, 4, 128)}},
        "no sound": {**one, "x": one["x"][:1]},
        "guides": {**base(1, 5), **shown, "timestep": (shown["timestep"], time)},
        "keyframes that are made": {**one, "generated_keyframes": KEYFRAMES},
    }


HEADS = {"attention_head_dim": 16, "num_attention_heads": 5, "cross_attention_dim": 80, "num_layers": 2}
VIDEO = {"image_model": "ltxv", "in_channels": 16, "caption_channels": 48, **HEADS}
VIDEO |= {"use_keyframes_abs_pos_embedding": True}
SOUND_HEADS = {"audio_attention_head_dim": 8, "audio_num_attention_heads": 5, "audio_cross_attention_dim": 40}
SOUND_HEADS |= {"connector_attention_head_dim": 8, "connector_num_attention_heads": 2, "connector_num_layers": 1}
SOUND = {**VIDEO, **SOUND_HEADS, "image_model": "ltxav", "audio_in_channels": 128}

NEWER = {"rope_type": "split", "frequencies_precision": "float64", "use_middle_indices_grid": True}
NEWER |= {"cross_attention_adaln": True, "apply_gated_attention": True, "caption_proj_before_connector": True}
NEWER |= {"connector_apply_gated_attention": True, "causal_temporal_positioning": True}


def subject(kind: str, config: Config, **more: object) -> Subject:
    is_video = kind == "LTXV"
    small = (*HEADS, "caption_channels") if is_video else (*HEADS, *SOUND_HEADS, "caption_channels")
    calls = video_calls if is_video else sound_calls
    return Subject(kind=kind, config={**config, **more}, small=small, calls=calls, refused=weak_guides)


LTXV_SUBJECTS = (subject("LTXV", VIDEO), subject("LTXV", VIDEO, rope_type="split"))
LTXAV_SUBJECTS = (subject("LTXAV", SOUND), subject("LTXAV", SOUND, **NEWER))
