"""Prompts as conditioning: a fixed vector for every word, in place of the large text encoders of Flux.

A word's vector comes from a generator that is seeded by the word, so nothing has to be stored, and any
prompt of known words can be encoded. Its place in the sentence is in the vector too: Flux gives all text
tokens the same position, and "red on blue" must differ from "blue on red".
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

DIM = 64
SHIFT = 7
EMPTY = 7
"""Tokens of the empty prompt: of most prompts, which were sometimes blanked in training."""

PROMPTS = (
    "a red circle on a white ground",
    "a blue star on a yellow ground",
    "a large green triangle on a white ground",
    "a small orange square on a blue ground",
    "a purple ring on a yellow ground",
    "a large white cross on a red ground",
    "a yellow star on a black ground",
    "a small blue circle on an orange ground",
    "a large black ring on a green ground",
    "an orange triangle on a purple ground",
    "a white square on a blue ground",
    "a red cross on a black ground",
)
"""The dozen prompts of the demo."""


def encode(prompt: str) -> tuple[Tensor, Tensor]:
    """context [1, words, DIM] and pooled [1, DIM]; for the empty prompt zeros, as many as in training.

    The sizes "small" and "large" stand in front of the others, so words are counted from the end:
    then colour, shape and ground keep their places.
    """
    words = prompt.split()
    if not words:
        return torch.zeros(1, EMPTY, DIM), torch.zeros(1, DIM)
    tokens = [torch.roll(_vector(word), SHIFT * place) for place, word in enumerate(reversed(words))]
    context = torch.stack(tokens)
    return context[None], context.mean(0, keepdim=True) * len(words) ** 0.5


def _vector(word: str) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
