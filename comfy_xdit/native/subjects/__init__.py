"""What the self-test makes and calls: tiny models of each family, one file a family."""

from __future__ import annotations

from comfy_xdit.native.subject import Subject

from . import anima, chroma, cosmos, flux, hunyuan, krea, ltx, lumina, minimax, pixart, qwen, sd3, wan

SUBJECTS: dict[str, tuple[Subject, ...]] = {
    "minimax-h3": minimax.SUBJECTS,
    "ltx-2": ltx.LTXAV_SUBJECTS,
    "ltxv": ltx.LTXV_SUBJECTS,
    "qwen-image": qwen.SUBJECTS,
    "z-image": lumina.SUBJECTS,
    "wan": wan.SUBJECTS,
    "wan-vace": wan.VACE_SUBJECTS,
    "krea2": krea.SUBJECTS,
    "flux": flux.FLUX1_SUBJECTS,
    "flux2": flux.FLUX2_SUBJECTS,
    "chroma": chroma.SUBJECTS,
    "hunyuan-video": hunyuan.HUNYUAN_SUBJECTS,
    "hunyuan-video-1.5": hunyuan.HUNYUAN15_SUBJECTS,
    "anima": anima.SUBJECTS,
    "sd3": sd3.SUBJECTS,
    "pixart": pixart.SUBJECTS,
    "cosmos": cosmos.SUBJECTS,
}
"""Family → its subjects."""
