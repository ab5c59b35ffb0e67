"""MiniMax-H3."""

from __future__ import annotations

import torch

from comfy_xdit.native.subject import Call, Config, Subject, rand, times

TAGS = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 1])
SHIFTS = {"minimax_h3_sigma_shift_video": 9.0, "minimax_h3_sigma_shift_audio": 2.0}


def calls(config: Config) -> dict[str, Call]:
    channels, audio = config["latents_dim"], config["audio_latents_dim"]
    one = {"x": [rand(1, channels, 3, 6, 10), rand(1, audio, 2, 7)], "timestep": times(700.0)}
    one |= {"context": rand(1, 9, config["text_dim"])}
    frames = [rand(1, channels, 1, 6, 10), rand(1, channels, 1, 6, 10)]
    sound = rand(1, audio, 2, 3)
    keyframes = [
        {"resolved_frame_index": 0, "latent": frames[0], "audio_latent": sound},
        {"resolved_frame_index": 8, "latent": frames[1]},
    ]
    references = [
        {"kind": "image", "latent_h": 4, "latent_w": 6, "latent": rand(1, channels, 1, 4, 6)},
        {"kind": "audio", "ref_audio_t": 3, "audio_latent": sound},
        {"kind": "video", "ref_audio_t": 0, "latent_t": 2, "latent_h": 4, "latent_w": 6}
        | {"latent": rand(1, channels, 2, 4, 6)},
    ]
    seen = {"cond_audio_latents": [sound], "seed": 3}
    from_frames = {"keyframes": keyframes, "cond_video_latents": frames, **seen, "text_token_tags": TAGS}
    latents = [part["latent"] for part in references if "latent" in part]
    from_references = {"refs": references, "cond_video_latents": latents, **seen}
    noisy = {"visual_cond_noise_aug": 0.9, "audio_cond_noise_aug": 0.8}
    return {
        "text": one,
        "odd sizes": {**one, "x": [rand(1, channels, 2, 5, 7), rand(1, audio, 2, 4)]},
        "refined text": {**one, "context": rand(1, 9, config["hidden_size"])},
        "sound on the video's schedule": {**one, "minimax_payload": {"audio_scale": 1.3}},
        "keyframes": {**one, "minimax_payload": from_frames},
        "references": {**one, "minimax_payload": from_references},
        "noisy references": {**one, "minimax_payload": {**from_references, **noisy}},
        "other shifts": {**one, "transformer_options": SHIFTS},
    }


SIZES = {"hidden_size": 80, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 5}
SIZES |= {"attention_head_dim": 16, "ffn_hidden_size": 80, "text_dim": 48, "rope_inv_freq_len": 2}
TIME = {"time_embed_hidden_size": 32, "time_embed_dim": 24, "timestep_input_dim": 16}
CONFIG = {"image_model": "minimax_h3", "latents_dim": 24, "audio_latents_dim": 32, **SIZES, **TIME}

SUBJECTS = (
    Subject(kind="MiniMaxH3", config=CONFIG, small=(*SIZES, *TIME), calls=calls),
    Subject(kind="MiniMaxH3", config={**CONFIG, "adaln_curve_grid": 9}, small=(*SIZES, *TIME), calls=calls),
)
