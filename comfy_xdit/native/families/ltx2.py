"""LTX-2: LTX-Video with a second stream, of sound; each block asks and tells the other."""

from __future__ import annotations

from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.parallel.tokens import Attention, Blocks, TokenPlan, Tokens

from .ltx import GUIDES, VIDEO, tensor_of

AUDIO = ("audio",)

# A timestep for each token, each frame, or one for all.
VIDEO_STEPS = Tokens(VIDEO, spread=True, expands=True)
AUDIO_STEPS = Tokens(AUDIO, spread=True, expands=True)

LTXAV = ComfyFamily(
    name="ltx-2",
    title="LTX-2",
    kinds=("LTXAV",),
    plan=TokenPlan(
        blocks=(
            Blocks(
                path="transformer_blocks",
                takes={
                    "x.0": Tokens(VIDEO),
                    "x.1": Tokens(AUDIO),
                    "v_timestep": VIDEO_STEPS,
                    "a_timestep": AUDIO_STEPS,
                    "v_pe": Tokens(VIDEO),
                    "a_pe": Tokens(AUDIO),
                    "v_cross_pe": Tokens(VIDEO),
                    "a_cross_pe": Tokens(AUDIO),
                    "v_cross_scale_shift_timestep": VIDEO_STEPS,
                    "a_cross_scale_shift_timestep": AUDIO_STEPS,
                    "v_cross_gate_timestep": VIDEO_STEPS,
                    "a_cross_gate_timestep": AUDIO_STEPS,
                    "self_attention_mask": GUIDES,
                },
                gives=("x.0", "x.1"),
                # A sound has few tokens, too.
                light=(
                    *("audio_attn", "audio_ff.", "attn2.to_k.", "attn2.to_v."),
                    *("audio_to_video_attn.to_k.", "audio_to_video_attn.to_v."),
                    *("video_to_audio_attn.to_q.", "video_to_audio_attn.to_out."),
                ),
            ),
        ),
        attention={
            "transformer_blocks.*.attn1": Attention(VIDEO),
            "transformer_blocks.*.audio_attn1": Attention(AUDIO),
            "transformer_blocks.*.audio_to_video_attn": Attention(VIDEO, keys=AUDIO),
            "transformer_blocks.*.video_to_audio_attn": Attention(AUDIO, keys=VIDEO),
        },
        tensor=tensor_of(
            ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
            ("ff", "audio_ff"),
        ),
    ),
    text_tokens=1024,
    num_heads=lambda transformer: min(transformer.num_attention_heads, transformer.audio_num_attention_heads),
    rows=("context", "attention_mask", "denoise_mask", "audio_denoise_mask", "keyframe_idxs", "a_timestep"),
    constants=("frame_rate", "guide_attention_entries", "generated_keyframes", "ref_audio"),
    prepares=("preprocess_text_embeds",),
)
