"""The workers' own service, with a fault on command in the middle of the next job.

Imported by the tests and, through `--path`, by the workers.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from comfy_xdit_worker.service import Service

from comfy_xdit.messages import Message, Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Break(Message):
    """On the given ranks the `evaluation`-th forward of the next job raises, or sleeps: messages were sent by then."""

    error: str
    ranks: list[int]
    evaluation: int = 2


ERRORS = {
    "library": ValueError("a library does not like it"),
    "bug": KeyError("a bug"),
    "memory": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


class Breakable(Service):
    def handle(self, message: Message) -> Result:
        if not isinstance(message, Break):
            return super().handle(message)
        self._groups.begin_job()
        if self.rank in message.ranks:
            self._break(message)
        return Result()

    def _break(self, message: Break) -> None:
        model = next(reversed(self._residents.models.values()))
        seen = []

        def hook(*_: object) -> None:
            seen.append(1)
            if len(seen) == message.evaluation:
                handle.remove()
                if message.error == "hang":
                    time.sleep(600)
                raise ERRORS[message.error]

        block = model.module.get_submodule(model.block_paths[model.stage[-1]])
        handle: torch.utils.hooks.RemovableHandle = block.register_forward_hook(hook)
