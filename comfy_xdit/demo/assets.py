"""Where the demo's files are, and what each is."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "assets"

MODEL = FOLDER / "tiny-flux.safetensors"
VAE = FOLDER / "tiny-flux-vae.safetensors"
LORA = FOLDER / "tiny-flux-outlined.safetensors"
CONDITIONING = FOLDER / "tiny-flux-prompts.safetensors"

# Of the latent, as ComfyUI has it for Flux: the transformer sees (latent - SHIFT) · SCALE.
SCALE, SHIFT = 0.3611, 0.1159
CHANNELS = 16
PIXELS = 8
"""Pixels for one latent pixel, along height and width."""


def check() -> None:
    """Raises ValueError when a file of the demo is missing."""
    for file in (MODEL, VAE, LORA, CONDITIONING):
        if not file.is_file():
            raise ValueError(
                f"the demo's file {file} is missing; reinstall, or make it with "
                f"`comfy-xdit demo train --out {FOLDER}`"
            )
