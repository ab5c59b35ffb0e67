"""Anima."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, rand, times


def calls(config: Config) -> dict[str, Call]:
    def base(batch: int, *size: int) -> Call:
        call = {"x": rand(batch, config["in_channels"], *size), "timestep": times(0.7, 0.3)[:batch]}
        return {**call, "context": rand(batch, 9, config["crossattn_emb_channels"])}

    return {"text": base(1, 1, 11, 13), "batch 2": base(2, 1, 6, 10), "frames": base(1, 3, 6, 10)}


SIZES = {"model_channels": 120, "num_blocks": 2, "num_heads": 5, "crossattn_emb_channels": 48, "adaln_lora_dim": 16}
CONFIG: Config = {"image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, **SIZES}
CONFIG |= {"in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1}
CONFIG |= {"concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": True}
CONFIG |= {"pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True}
CONFIG |= {"extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0}
CONFIG |= {"rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0}

SUBJECTS = (Subject(kind="Anima", config=CONFIG, small=tuple(SIZES), calls=calls),)
