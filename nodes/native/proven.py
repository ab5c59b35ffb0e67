"""Before a family of ComfyUI's own classes is cut over ranks: does its plan hold here, and for this file?"""

from __future__ import annotations

import functools

from comfy_xdit_nodes.native.checkpoint import ComfyCheckpoint
from comfy_xdit_nodes.native.options import use_comfy
from comfy_xdit_nodes.remote import poll

from comfy_xdit.native.boot import sources_of
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.proof import RESULTS, why_refused
from comfy_xdit.native.subject import as_text, from_text


def require_proven(checkpoint: ComfyCheckpoint) -> None:
    """Raises ValueError, with the versions, where the family's self-test fails or can't be run.

    The first time with a version of ComfyUI, and with a configuration like the file's, it takes some seconds; what was
    found is kept. Raises ComfyUI's interruption.
    """
    _require(checkpoint.family.name, checkpoint.message.family, as_text(checkpoint.config))


# A refusal is not kept here: it may have failed for want of memory.
@functools.lru_cache(maxsize=64)
def _require(name: str, kind: str, config: str) -> None:
    # Here, not at import: like the pool it takes modules that only Linux has.
    from comfy_xdit.pool.folder import own_folder

    message = use_comfy()
    assert message is not None, "no MODEL is described for workers that can't have its class"
    if sources_of(message.folder) != message.sources:
        raise ValueError("ComfyUI's files have changed since it was started; restart ComfyUI and the pool")
    why = why_refused(FAMILIES[name], {kind: from_text(config)}, message.folder, own_folder() / RESULTS, poll)
    if why:
        raise ValueError(why)
