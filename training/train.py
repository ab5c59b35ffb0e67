"""`comfy-xdit demo train`: make the demo's files.

A tiny VAE, a tiny Flux, a LoRA for it and a file of conditioning tensors, learnt from pictures that
pictures.py draws. Half an hour of one core, no GPU and no download. What is done is kept in DIR: an
interrupted run goes on where it was saved last, and a stage goes on when it is given more steps.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfy_xdit.demo import words
from comfy_xdit.demo.assets import SCALE, SHIFT
from comfy_xdit.demo.pictures import Scene, as_pictures, contact_sheet

from . import autoencoder, flux

log = logging.getLogger("comfy_xdit")

SAVE_EVERY = 100
BATCH = 24


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Short warm-up, constant, and down to zero over the last third."""
    return peak * min(1.0, (step + 1) / 50, 3 * (num_steps - step) / num_steps)


class Stage:
    """One stage of training with its saved state: `steps` yields the step numbers that are left to do."""

    def __init__(self, out: Path, name: str, num_steps: int) -> None:
        self.file, self.name, self.num_steps = out / f"{name}.state", name, num_steps
        self.first = 0
        self.state: dict[str, Any] = {}

    def resume(self, state: dict[str, Any]) -> None:
        """state: everything that goes on over a restart; each item has state_dict and load_state_dict."""
        self.state = state
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.first = saved.pop("step")
            for key, item in saved.items():
                state[key].load_state_dict(item)

    def steps(self) -> Iterator[int]:
        for step in range(self.first, self.num_steps):
            yield step
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.num_steps:
                self.save(step + 1)

    def save(self, step: int) -> None:
        saved = {key: item.state_dict() for key, item in self.state.items()}
        torch.save({"step": step, **saved}, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)


def train_vae(out: Path, num_steps: int) -> Any:
    """The VAE without its finest branches; then its latent is given Flux's scale, and the encoder is done."""
    torch.manual_seed(1)
    vae = autoencoder.new_vae()
    autoencoder.skip_finest(vae, True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    train_pictures(Stage(out, "vae", num_steps), vae, optimizer, noise=0.05)
    autoencoder.normalise(vae, autoencoder.batch_of_pictures(random.Random(-2), 64, crop=None))
    return vae


def train_decoder(out: Path, vae: Any, num_steps: int) -> None:
    """All of the decoder, for the latent as it is now; writes the VAE."""
    torch.manual_seed(4)
    vae.encoder.requires_grad_(False)
    autoencoder.skip_finest(vae, False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    train_pictures(Stage(out, "decoder", num_steps), vae, optimizer, noise=0.05 / SCALE)
    save_half(autoencoder.ldm_state_dict(vae), out / "tiny-flux-vae.safetensors")


def train_pictures(stage: Stage, vae: Any, optimizer: torch.optim.Optimizer, *, noise: float) -> None:
    stage.resume({"vae": vae, "optimizer": optimizer})
    started, recent = time.monotonic(), 0.0
    for step in stage.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.num_steps, 1.5e-3)
        whole = step % 5 == 4
        num, crop = (2, None) if whole else (6, autoencoder.CROP)
        images = autoencoder.batch_of_pictures(random.Random(step), num, crop=crop)
        error = autoencoder.train_step(vae, optimizer, images, noise=noise)
        recent = error if step == stage.first else 0.95 * recent + 0.05 * error
        if step % 20 == 0:
            log.info("%s %d: error %.4f, %.0f s", stage.name, step, recent, time.monotonic() - started)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.num_steps:
            sample_vae(vae, stage.file.with_suffix(".png"))


@torch.no_grad()
def sample_vae(vae: Any, file: Path) -> None:
    images = autoencoder.batch_of_pictures(random.Random(-1), 8, crop=None)
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    rows = [as_pictures(images), as_pictures(decoded)]
    contact_sheet(rows, [""] * 8, ["drawn", "decoded"]).save(file)


def train_flux(out: Path, vae: Any, num_steps: int, num_pictures: int) -> dict[str, Tensor]:
    """The transformer; returns its averaged weights in ComfyUI's layout."""
    torch.manual_seed(2)
    module, weights, targets = flux.new_flux()
    latents, scenes = encoded(out / "flux.latents", vae, 2, num_pictures, outlined=False)
    log.info("%d latents: mean %.3f, std %.3f", num_pictures, latents.float().mean(), latents.float().std())

    def save(average: dict[str, Tensor]) -> None:
        sample_flux(module, flux.in_diffusers_layout(average, targets), vae, out / "flux.png")
        save_half(average, out / "tiny-flux.safetensors")

    def loss(current: dict[str, Tensor], picks: list[int]) -> Tensor:
        layout = flux.in_diffusers_layout(current, targets)
        return flux.batch_loss(module, layout, latents, scenes, picks)

    return train_weights(Stage(out, "flux", num_steps), weights, loss, scenes, save, peak=1.5e-3)


def train_lora(out: Path, vae: Any, weights: dict[str, Tensor], num_steps: int, num_pictures: int) -> dict[str, Tensor]:
    """The LoRA, on outlined pictures; returns its averaged weights under kohya's names."""
    torch.manual_seed(3)
    module, _, targets = flux.new_flux()
    latents, scenes = encoded(out / "lora.latents", vae, 3, num_pictures, outlined=True)

    def layout(lora: dict[str, Tensor]) -> dict[str, Tensor]:
        return flux.in_diffusers_layout(flux.with_lora(weights, lora), targets)

    def save(average: dict[str, Tensor]) -> None:
        sample_flux(module, layout(average), vae, out / "lora.png")
        save_half(average, out / "tiny-flux-outlined.safetensors")

    def loss(current: dict[str, Tensor], picks: list[int]) -> Tensor:
        return flux.batch_loss(module, layout(current), latents, scenes, picks)

    lora = flux.new_lora(weights, 3)
    return train_weights(Stage(out, "lora", num_steps), lora, loss, scenes, save, peak=4e-3)


def encoded(file: Path, vae: Any, seed: int, num: int, *, outlined: bool) -> tuple[Tensor, list[Scene]]:
    """What there is to learn; encoded once, since it takes minutes."""
    scenes = flux.scenes_to_learn(seed, num)
    if not file.exists():
        torch.save(flux.encode_pictures(vae, scenes, outlined=outlined), file)
    return torch.load(file, weights_only=True), scenes


class Weights:
    """Named tensors with the two methods that `Stage` keeps things by."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return {key: tensor.detach() for key, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        for key, tensor in self.tensors.items():
            tensor.copy_(saved[key])


def train_weights(
    stage: Stage,
    weights: dict[str, Tensor],
    loss: Callable[[dict[str, Tensor], list[int]], Tensor],
    scenes: list[Scene],
    save: Callable[[dict[str, Tensor]], None],
    *,
    peak: float,
) -> dict[str, Tensor]:
    """Adam on `loss(weights, numbers of the pictures)`; returns the running average of the weights."""
    average = {key: tensor.clone() for key, tensor in weights.items()}
    for tensor in weights.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    stage.resume({"weights": Weights(weights), "average": Weights(average), "optimizer": optimizer})
    # Prompts of different lengths don't stack: each batch has one length.
    lengths: dict[int, list[int]] = {}
    for number, scene in enumerate(scenes):
        lengths.setdefault(len(scene.prompt.split()), []).append(number)
    started, recent = time.monotonic(), 0.0
    for step in stage.steps():
        chance = random.Random(step)
        numbers = lengths[len(chance.choice(scenes).prompt.split())]
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.num_steps, peak)
        torch.manual_seed(step)
        value = loss(weights, chance.sample(numbers, BATCH))
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for key, tensor in weights.items():
                average[key].lerp_(tensor, max(0.02, 1 / (step + 1)))
        recent = value.item() if step == stage.first else 0.95 * recent + 0.05 * value.item()
        if step % 20 == 0:
            log.info("%s %d: loss %.4f, %.0f s", stage.name, step, recent, time.monotonic() - started)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.num_steps:
            save(average)
    return average


def sample_flux(module: Any, weights: dict[str, Tensor], vae: Any, file: Path) -> None:
    """Half of the demo's prompts, to look at."""
    prompts = list(words.PROMPTS[::2])
    latents = torch.cat([flux.sample(module, weights, prompt, seed=7) for prompt in prompts])
    with torch.no_grad():
        images = vae.decode(latents / SCALE + SHIFT).sample
    contact_sheet([as_pictures(images)], prompts, [file.stem]).save(file)


def save_half(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({key: tensor.detach().half().contiguous() for key, tensor in tensors.items()}, file)


def save_conditioning(file: Path) -> None:
    """The demo's prompts and the empty one: tensors "<prompt>|context" and "<prompt>|pooled"."""
    tensors: dict[str, Tensor] = {}
    for prompt in (*words.PROMPTS, ""):
        context, pooled = words.encode(prompt)
        tensors |= {f"{prompt}|context": context, f"{prompt}|pooled": pooled}
    save_file(tensors, file)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--vae-steps", type=int, default=330)
    parser.add_argument("--decoder-steps", type=int, default=250)
    parser.add_argument("--flux-steps", type=int, default=2100)
    parser.add_argument("--lora-steps", type=int, default=750)
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def run(options: argparse.Namespace) -> int:
    """Train all four, one after the other."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    save_conditioning(options.out / "tiny-flux-prompts.safetensors")
    vae = train_vae(options.out, options.vae_steps)
    train_decoder(options.out, vae, options.decoder_steps)
    weights = train_flux(options.out, vae, options.flux_steps, options.pictures)
    train_lora(options.out, vae, weights, options.lora_steps, options.pictures // 2)
    return 0
