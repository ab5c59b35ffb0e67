"""Families of ComfyUI's own classes as workflows use them: tiny files for the stock loaders, latents, conditioning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import comfy.nested_tensor
import comfy.sample
import comfy.sd
import comfy.supported_models
import native_models as make
import torch
from comfy_xdit_nodes.native.export import QUANTISED
from comfy_xdit_nodes.parity import models as tiny

from comfy_xdit.native.subjects import anima, cosmos, flux, hunyuan, krea, ltx, lumina, minimax

NUM_TEXT = 9


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(path, state, note):
    """A safetensors file in which all weights lie at multiples of 16 bytes, if their sizes are such.

    Used from the map at another place a matrix product rounds otherwise on a CPU, and one rank is not stock's equal.
    """
    header, end = {"__metadata__": note}, 0
    ordered = sorted(state.items(), key=lambda item: item[1].nbytes % 16 != 0)
    for key, weight in ordered:
        place = [end, end + weight.nbytes]
        header[key] = {"dtype": QUANTISED[weight.dtype], "shape": list(weight.shape), "data_offsets": place}
        end += weight.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, weight in ordered:
            file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what a workflow gives it.

    kind, config: of ComfyUI's configuration, as its detection finds them in the file; noted: the file's header says it.
    shapes: of a row of each latent; odd: the same of sizes that no patch divides. text: the text's channels.
    form: formats of the blocks' matrices in turn, none for plain fp32. mask: of the first latent, 0 where it is given.
    both, positive: further entries of both kinds of conditioning and of the positive one; a function is given the
    text's length. counts: names of entries without which the latents are others. rows: the most that the model takes.
    limit: of N ranks' largest error, of the largest number; near: of a run of few steps with old keys.
    """

    kind: str
    config: dict
    shapes: tuple
    odd: tuple
    text: int
    noted: bool = False
    form: tuple = ()
    mask: torch.Tensor | None = None
    both: dict = dataclasses.field(default_factory=dict)
    positive: dict = dataclasses.field(default_factory=dict)
    counts: tuple = ()
    rows: int = 2
    limit: float = 1e-5
    near: float = 0.02
    has_pipe: bool = True

    @property
    def is_known(self):
        return hasattr(comfy.supported_models, self.kind)

    def load(self, path):
        """The stock loader's MODEL of a file at `path`, which is written."""
        config = getattr(comfy.supported_models, self.kind)(dict(self.config))
        state = make.weights(config, torch.bfloat16 if self.form else torch.float32)
        state = make.quantised(state, list(self.form)) if self.form else state
        save(path, state, {"config": json.dumps({"transformer": self.config})} if self.noted else {})
        # As ComfyUI does: quantised weights that are made outside can't be used inside.
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(str(path))
        assert type(model.model.model_config).__name__ == self.kind
        return model

    def run(self, model, *, rows=1, odd=False, lengths=(NUM_TEXT, NUM_TEXT), cfg=3.0):
        """The latents that ComfyUI's sampler makes. lengths: of the two texts."""
        shapes = [(rows, *shape) for shape in (self.odd if odd else self.shapes)]
        noises = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        latents = [torch.zeros(shape) if self.mask is None else random(*shape, seed=9) for shape in shapes]
        positive = self._conditioning(lengths[0], 7, {**self.both, **self.positive})
        negative = self._conditioning(lengths[1], 8, self.both)
        nested = comfy.nested_tensor.NestedTensor
        latent, noise = (parts[0] if len(parts) == 1 else nested(parts) for parts in (latents, noises))
        more = {"disable_pbar": True, "seed": 1}
        if self.mask is not None:
            more["noise_mask"] = self.mask
        with torch.inference_mode():
            out = comfy.sample.sample(model, noise, 2, cfg, "euler", "simple", positive, negative, latent, **more)
        return out.unbind() if isinstance(out, nested) else [out]

    def _conditioning(self, length, seed, more):
        found = {name: value(length) if callable(value) else value for name, value in more.items()}
        return [[random(1, length, self.text, seed=seed), found]]


def error_of(ours, expected):
    """The largest, as a part of the largest number; infinite where that shows nothing."""
    if not all(wanted.isfinite().all() and wanted.std() > 0 for wanted in expected):
        return float("inf")
    pairs = list(zip(ours, expected, strict=True))
    return max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs)


def first_frame_given(*shape):
    """The mask of a video whose first frame is not made."""
    mask = torch.ones(1, 1, *shape)
    mask[:, :, 0] = 0
    return mask


def ones(length):
    return torch.ones(1, length, dtype=torch.long)


Table = dict[str, Case]


def minimax_cases() -> Table:
    wide = {"attention_head_dim": 32, "rope_inv_freq_len": 4}
    plain, curves = ({**subject.config, **wide} for subject in minimax.SUBJECTS)
    sizes = {"shapes": ((24, 3, 6, 10), (32, 2, 7)), "odd": ((24, 2, 5, 7), (32, 2, 5)), "text": 48, "rows": 1}

    def tags(length):
        return minimax.TAGS[:length]

    frame, sound = random(1, 24, 1, 6, 10), random(1, 32, 2, 3)
    keyframes = [
        {"resolved_frame_index": 0, "latent": frame, "audio_latent": sound},
        {"resolved_frame_index": 4, "latent": frame + 1},
    ]
    references = [
        {"kind": "image", "latent_h": 4, "latent_w": 6, "latent": random(1, 24, 1, 4, 6)},
        {"kind": "video", "latent_t": 2, "latent_h": 4, "latent_w": 6, "ref_audio_t": 0}
        | {"latent": random(1, 24, 2, 4, 6), "audio_latent": None},
        {"kind": "audio", "ref_audio_t": 3, "audio_latent": sound},
    ]
    noisy = {"minimax_visual_cond_noise_aug": 0.9, "minimax_audio_cond_noise_aug": 0.8}
    shown = {"minimax_token_tags": tags, "minimax_keyframes": keyframes}
    return {
        "minimax-h3": Case(kind="MiniMaxH3", config=plain, **sizes),
        # A guide's frames have the sizes of the video's.
        "minimax-h3 keyframes": Case(
            kind="MiniMaxH3", config=plain, **{**sizes, "odd": sizes["shapes"]}, positive=shown, counts=tuple(shown)
        ),
        "minimax-h3 references": Case(
            kind="MiniMaxH3",
            config=curves,
            **sizes,
            positive={"minimax_refs": references, **noisy},
            counts=("minimax_refs", *noisy),
        ),
    }


def ltx_cases() -> Table:
    one = {**ltx.LTXAV_SUBJECTS[0].config, "in_channels": 128, "connector_attention_head_dim": 24}
    newer = {**ltx.LTXAV_SUBJECTS[1].config, "in_channels": 128, "connector_attention_head_dim": 40}
    newer |= {"audio_connector_attention_head_dim": 20, "caption_projection_first_linear": False}
    video = {**ltx.LTXV_SUBJECTS[0].config, "in_channels": 128}
    sizes = {"shapes": ((128, 3, 4, 6), (8, 11, 16)), "odd": ((128, 3, 5, 7), (8, 7, 16)), "noted": True}
    frames = {"shapes": ((128, 3, 4, 6),), "odd": ((128, 3, 5, 7),), "noted": True, "text": 48}
    raw = {"unprocessed_ltxav_embeds": True, "frame_rate": 24}
    mask = first_frame_given(3, 4, 6)
    return {
        "ltx-2": Case(kind="LTXAV", config=one, **sizes, text=48, both=raw, counts=("frame_rate",)),
        "ltx-2 processed text": Case(kind="LTXAV", config=one, **sizes, text=96),
        "ltx-2.3 first frame": Case(
            kind="LTXAV",
            config=newer,
            **{**sizes, "odd": sizes["shapes"]},
            text=120,
            both=raw,
            counts=tuple(raw),
            mask=mask,
        ),
        "ltxv": Case(kind="LTXV", config=video, **frames, both={"attention_mask": ones}),
        "ltxv first frame": Case(
            kind="LTXV", config=video, **{**frames, "odd": frames["shapes"]}, both={"attention_mask": ones}, mask=mask
        ),
    }


def wan_cases() -> Table:
    sizes = {"shapes": ((16, 3, 6, 8),), "odd": ((16, 3, 5, 7),), "text": 4096}
    seen = {"concat_latent_image": random(1, 16, 3, 6, 8, seed=5)}
    seen |= {"concat_mask": (random(1, 1, 3, 6, 8, seed=6) > 0).float()}
    wide = {"in_dim": 48, "out_dim": 48}
    i2v = make.wan("WAN21_I2V", model_type="i2v", in_dim=36).unet_config
    vace = make.wan("WAN21_Vace", model_type="vace", vace_in_dim=96, vace_layers=1).unet_config
    hints = {"vace_frames": [random(1, 32, 3, 6, 8)], "vace_mask": [torch.ones(1, 64, 3, 6, 8)], "vace_strength": [0.8]}
    large = {"shapes": ((48, 3, 6, 8),), "odd": ((48, 3, 6, 8),), "text": 4096}
    return {
        "wan": Case(kind="WAN21_T2V", config=make.wan().unet_config, **sizes),
        "wan i2v": Case(kind="WAN21_I2V", config=i2v, **sizes, both=seen, counts=tuple(seen)),
        "wan 2.2 ti2v": Case(kind="WAN22_T2V", config=make.wan("WAN22_T2V", **wide).unet_config, **large),
        "wan 2.2 ti2v first frame": Case(
            kind="WAN22_T2V",
            config=make.wan("WAN22_T2V", **wide).unet_config,
            **large,
            mask=first_frame_given(3, 6, 8),
        ),
        "wan vace": Case(
            kind="WAN21_Vace",
            config=vace,
            **{**sizes, "odd": sizes["shapes"]},
            both=hints,
            counts=("vace_frames",),
            has_pipe=False,
        ),
    }


def image_cases() -> Table:
    size, odd = (10, 12), (11, 13)
    latents = {"shapes": ((16, *size),), "odd": ((16, *odd),)}
    frames = {"shapes": ((16, 1, *size),), "odd": ((16, 1, *odd),)}
    references = {"reference_latents": [random(1, 16, 6, 8), random(1, 16, 4, 6)]}
    krea2 = {"features": 512, "heads": 4, "kvheads": 2, "tdim": 256, "txtdim": 80, "txtheads": 20, "txtkvheads": 20}
    wide = {"hidden_size": 256, "num_heads": 2}
    klein = {**flux.FLUX2, **wide, "axes_dim": [32] * 4, "in_channels": 128, "out_channels": 128}
    klein |= {"guidance_embed": False}
    flux2 = {**klein, "guidance_embed": True}
    grid = {"shapes": ((128, 5, 6),), "odd": ((128, 5, 7),), "text": 48}
    seen = {"reference_latents": [random(1, 128, 3, 4)]}
    qwen = {"kind": "QwenImage", "config": make.qwen().unet_config, **frames, "text": 3584}
    qwen["form"] = ("float8_e4m3fn",)
    fill = {"concat_latent_image": random(1, 16, *size, seed=5), "concat_mask": (random(1, 1, 80, 96) > 0).float()}
    flux1 = {**latents, "text": tiny.CONTEXT, "form": ("float8_e4m3fn", "nvfp4")}
    dev, inpaint = tiny.flux_config().unet_config, {**tiny.flux_config().unet_config, "in_channels": 96}
    pooled = {"pooled_output": random(1, tiny.POOLED), "guidance": 3.0}
    canny, beside = {**dev, "in_channels": 32}, {"concat_latent_image": fill["concat_latent_image"]}
    edit = [reference[:, :, None] for reference in references["reference_latents"]]
    return {
        "qwen": Case(**qwen, both={"attention_mask": ones}),
        "qwen edit": Case(**qwen, both={"reference_latents": edit}, counts=("reference_latents",)),
        "krea2": Case(kind="Krea2", config={**krea.SUBJECTS[0].config, **krea2}, **frames, text=160, near=0.6),
        "krea2 references": Case(
            kind="Krea2",
            config={**krea.SUBJECTS[0].config, **krea2},
            **frames,
            text=160,
            both={"reference_latents": edit, "reference_latents_method": "index_timestep_zero"},
            counts=("reference_latents",),
            near=0.6,
        ),
        "anima": Case(
            kind="Anima",
            config={**anima.CONFIG, "model_channels": 256, "num_heads": 16, "crossattn_emb_channels": 1024}
            | {"adaln_lora_dim": 256, "num_blocks": 10},
            **frames,
            text=1024,
            both={"t5xxl_ids": torch.arange(3, 10), "t5xxl_weights": torch.linspace(0.5, 1.5, 7)},
            counts=("t5xxl_ids",),
        ),
        "flux2": Case(kind="Flux2", config=flux2, **grid, both={"guidance": 3.0}, counts=("guidance",)),
        "flux2 klein references": Case(kind="Flux2", config=klein, **grid, both=seen, counts=tuple(seen)),
        "flux kontext": Case(kind="Flux", config=dev, **flux1, both={**pooled, **references}, counts=tuple(references)),
        "flux canny": Case(kind="Flux", config=canny, **flux1, both={**pooled, **beside}, counts=tuple(beside)),
        "flux fill": Case(kind="FluxInpaint", config=inpaint, **flux1, both={**pooled, **fill}, counts=tuple(fill)),
    }


def cosmos_cases() -> Table:
    wide = {"model_channels": 256, "num_heads": 16, "crossattn_emb_channels": 1024, "adaln_lora_dim": 256}
    # As many as ComfyUI 0.29.0 takes for granted.
    wide["num_blocks"] = 10
    images, videos = ({**subject.config, **wide} for subject in cosmos.SUBJECTS)
    size, odd = (16, 3, 6, 8), (16, 3, 7, 9)
    return {
        "cosmos": Case(kind="CosmosT2IPredict2", config=images, shapes=(size,), odd=(odd,), text=1024),
        "cosmos from a frame": Case(
            kind="CosmosI2VPredict2",
            config=videos,
            shapes=(size,),
            odd=(size,),
            text=1024,
            mask=first_frame_given(3, 6, 8),
            both={"frame_rate": 24},
        ),
    }


def hunyuan_cases() -> Table:
    wide = {"hidden_size": 256, "num_heads": 2, "axes_dim": [16, 56, 56], "vec_in_dim": 768}
    config = {**hunyuan.HUNYUAN_SUBJECTS[0].config, **wide}
    sizes = {"shapes": ((16, 3, 6, 8),), "odd": ((16, 2, 6, 10),), "text": 48}
    both, frame = {"pooled_output": random(1, 768)}, {"guiding_frame_index": 0}
    return {
        "hunyuan-video": Case(kind="HunyuanVideo", config=config, **sizes, both=both),
        "hunyuan-video from a frame": Case(
            kind="HunyuanVideo",
            config=config,
            **{**sizes, "odd": sizes["shapes"]},
            both={**both, **frame},
            counts=tuple(frame),
        ),
    }


def z_image_cases() -> Table:
    """At the published width, by which ComfyUI knows it, and of two layers."""
    config = {**lumina.Z, "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 64, "axes_dims": [32, 48, 48]}
    config |= {"axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8.0 / 3.0}
    sizes = {"shapes": ((16, 4, 6),), "odd": ((16, 5, 7),), "text": 64, "form": ("float8_e4m3fn",)}
    return {"z-image": Case(kind="ZImage", config=config, **sizes)}


def made(*tables: Callable[[], Table]) -> Table:
    """The cases that this ComfyUI has a class for."""
    return {name: case for table in tables for name, case in table().items() if case.is_known}
