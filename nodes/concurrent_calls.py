"""Cond and uncond that can't be one batch, evaluated side by side.

When prompts differ in length ComfyUI calls the model twice, one call after the other, and cfg
parallelism would have nothing to split. So ComfyUI's own code is run once for each list of
conditioning, in threads of their own, which meet where the calls leave for the workers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from torch import Tensor

Call = tuple[dict[str, Any], int]


class Meeting:
    """Collects one call from each of its threads and sends them as one.

    send(calls) → one output per call. A thread that ends, or fails, no longer keeps the others waiting.
    """

    def __init__(self, num_threads: int, send: Callable[[list[Call]], list[Tensor]]) -> None:
        self._send = send
        self._present = num_threads
        self._changed = threading.Condition()
        self._round = _Round()

    def bring(self, call: Call) -> Tensor:
        """The output of `call`; waits for the other threads' calls. Raises what sending raised."""
        with self._changed:
            this = self._round
            place = len(this.calls)
            this.calls.append(call)
            self._changed.notify_all()
            self._changed.wait_for(lambda: this.done)
        if this.error is not None:
            raise this.error
        return this.outputs[place]

    def leave(self) -> None:
        """Tell the others not to wait for this thread any more."""
        with self._changed:
            self._present -= 1
            self._changed.notify_all()

    def serve(self) -> None:
        """Send each round when it is full, until every thread has left.

        Runs in the thread that started them: the lease on the pool and inference mode are its own.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: len(self._round.calls) >= self._present)
                if not self._present:
                    return
                this, self._round = self._round, _Round()
                try:
                    this.outputs = self._send(this.calls)
                except BaseException as error:  # Every caller of this round raises it, interruption included.
                    this.error = error
                this.done = True
                self._changed.notify_all()


class _Round:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs: list[Tensor] = []
        self.error: BaseException | None = None
        self.done = False


def calc_cond_batch(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's CALC_COND_BATCH wrapper: side by side when that helps, else as ComfyUI does it."""
    model, conds, x_in, timestep, model_options = args[:5]
    run = getattr(getattr(model, "remote", None), "run", None)
    filled = [i for i, cond in enumerate(conds) if cond]
    if run is None or run.meeting is not None or len(filled) < 2 or _watched(model_options):
        return executor(*args, **kwargs)
    if run.spec(len(filled)).cfg < 2 or _one_batch([conds[i] for i in filled], x_in, timestep):
        return executor(*args, **kwargs)

    def alone(i: int) -> Any:
        only = [cond if place == i else None for place, cond in enumerate(conds)]
        return executor(model, only, x_in, timestep, model_options, *args[5:], **kwargs)[i]

    outputs = side_by_side([lambda i=i: alone(i) for i in filled], run)
    return [outputs[filled.index(i)] if i in filled else torch.zeros_like(x_in) for i in range(len(conds))]


def _watched(model_options: dict[str, Any]) -> bool:
    """Whether code that isn't ours looks at each call: it may not stand being run in two threads."""
    kinds = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    wrapped = any(get_all_wrappers(kind, model_options, is_model_options=True) for kind in kinds)
    return wrapped or "model_function_wrapper" in model_options


def _one_batch(conds: list[list[dict[str, Any]]], x_in: Tensor, timestep: Tensor) -> bool:
    """Whether ComfyUI will put all of them into one call."""
    parts = [comfy.samplers.get_area_and_mult(cond, x_in, timestep) for group in conds for cond in group]
    parts = [part for part in parts if part is not None]
    return all(comfy.samplers.can_concat_cond(parts[0], part) for part in parts[1:])


def side_by_side(tasks: list[Callable[[], Any]], run: Any) -> list[Any]:
    """The results of `tasks`, each in a thread; their calls of the model meet in one message.

    Raises the first error of a task.
    """
    meeting = Meeting(len(tasks), run.send)
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    # Inference mode belongs to a thread: without it ComfyUI's in-place sums would be refused.
    inference = torch.is_inference_mode_enabled()

    def work(i: int) -> None:
        try:
            with torch.inference_mode(inference):
                results[i] = tasks[i]()
        except BaseException as error:  # Raised again in the caller's thread.
            errors.append(error)
        finally:
            meeting.leave()

    with _meeting(run, meeting):
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(tasks))]
        for thread in threads:
            thread.start()
        meeting.serve()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def _meeting(run: Any, meeting: Meeting) -> Iterator[None]:
    run.meeting = meeting
    try:
        yield
    finally:
        run.meeting = None
