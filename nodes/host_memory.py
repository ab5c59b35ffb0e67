"""The memory of cards that ComfyUI and a pool's workers share: who has it, and ComfyUI's part of it given back."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import torch

from comfy_xdit.pool.errors import PoolError

if TYPE_CHECKING:
    from comfy_xdit_nodes.residency import Residency

    from comfy_xdit.pool.client import Pool

log = logging.getLogger("comfy_xdit")

EVERYTHING = 1e28
"""More bytes than a card has, less than at which ComfyUI would unload the workers too."""


def make_room(pool: Pool, residency: Residency, key: str) -> dict[str, int] | None:
    """Before a model or VAE is loaded: ComfyUI frees what it holds on the pool's cards. Returns what `room` does.

    residency: its own; key: under which the pool would hold it. None when it is resident: then nothing is freed,
    and nothing moves.
    """
    try:
        ranks = pool.status().get("ranks", [])
    except PoolError:
        # It was stopped; the run starts it anew.
        ranks = []
    if residency and ranks and all(_holds(rank, key) for rank in ranks):
        return None
    freed = {str(card): _free(card) for card in shared_cards(pool)}
    return room(ranks, freed)


def room(ranks: list[dict[str, Any]], freed: dict[str, int]) -> dict[str, int]:
    """Rank's number → bytes that a model could have there: what is free, and what the pool itself holds and may unload.

    ranks: as the pool's status tells them, from before ComfyUI gave back `freed` (card → bytes). Ranks on a CPU, and
    those that haven't told, are not in it.
    """
    return {
        str(rank["rank"]): rank["device_bytes"] + rank["device_free_bytes"] + freed.get(rank["device"], 0)
        for rank in ranks
        if "device_free_bytes" in rank
    }


def shared_cards(pool: Pool) -> list[torch.device]:
    """The cards on which ComfyUI works and which the pool may use."""
    cards = {mm.get_torch_device(), *(loaded.device for loaded in mm.current_loaded_models)}
    # Where ComfyUI sees some cards only, it numbers them otherwise than a pool that was started by hand.
    same_numbers = "CUDA_VISIBLE_DEVICES" not in os.environ
    on_cards = any(not device.startswith("cpu") for device in pool.devices)
    shared = (card for card in cards if card.type != "cpu" and (not same_numbers or _name(card) in pool.devices))
    return sorted(shared, key=str) if on_cards else []


def _name(card: torch.device) -> str:
    return str(card) if card.index is not None else f"{card}:0"


def _free(card: torch.device) -> int:
    """Have ComfyUI unload its models from the card and return the memory to the driver; how many bytes that gave."""
    before = _driver_free(card)
    # A skeleton knows where its weights are resident; there is nothing of it here.
    ours = [loaded for loaded in mm.current_loaded_models if hasattr(getattr(loaded.model, "model", None), "residency")]
    mm.free_memory(EVERYTHING, card, keep_loaded=ours)
    mm.soft_empty_cache()
    freed = max(0, _driver_free(card) - before)
    if freed:
        log.info("ComfyUI gave %.2f GB of %s to the workers", freed / 1e9, card)
    return freed


def _driver_free(card: torch.device) -> int:
    """Bytes that another process could have: torch keeps some that it does not use."""
    free, kept = mm.get_free_memory(card, torch_free_too=True)
    return int(free - kept)


def _holds(rank: dict[str, Any], key: str) -> bool:
    return key in rank.get("vaes", ()) or any(model.get("model") == key for model in rank.get("models", ()))
