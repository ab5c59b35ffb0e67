"""Before a family of ComfyUI's own classes is cut over ranks: does its plan hold for this ComfyUI?"""

from __future__ import annotations

import functools
import logging

from comfy_xdit_nodes.native.options import use_comfy

from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.family import ComfyFamily
from comfy_xdit.native.proof import RESULTS, finding_key, findings, why_refused

log = logging.getLogger("comfy_xdit")


def require_proven(family: ComfyFamily) -> None:
    """Raises ValueError, with the versions, where the family's self-test fails or can't be run.

    The first time with a version of ComfyUI it takes some seconds; what was found is kept.
    """
    why = _why_refused(family.name)
    if why:
        # Asked again next time: it may have failed for want of memory.
        _why_refused.cache_clear()
        raise ValueError(why)


@functools.lru_cache(maxsize=64)
def _why_refused(name: str) -> str:
    # Here, not at import: like the pool it takes modules that only Linux has.
    from comfy_xdit.pool.folder import own_folder

    family = FAMILIES[name]
    message, results = use_comfy(), own_folder() / RESULTS
    assert message is not None, "no MODEL is described for workers that can't have its class"
    if finding_key(family, message.folder) not in findings(results):
        log.info("%s: trying its plan on this ComfyUI, once, some seconds", family.title)
    return why_refused(family, message.folder, results)
