"""The call that leaves ComfyUI: one evaluation of the diffusion transformer, and the run around it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from comfy_xdit_nodes.concurrent_calls import Meeting
from comfy_xdit_nodes.held import Constants
from comfy_xdit_nodes.host_memory import make_room
from comfy_xdit_nodes.native.options import same_everywhere, use_comfy
from comfy_xdit_nodes.patches import MODEL
from comfy_xdit_nodes.record import Record
from comfy_xdit_nodes.refuse import refuse_options
from comfy_xdit_nodes.residency import Residency
from torch import Tensor

from comfy_xdit import messages as m
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.pool.errors import PoolError
from comfy_xdit.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from comfy_xdit_nodes.trajectory import SamplingJob

    from comfy_xdit.pool.client import Pool
    from comfy_xdit.trajectory import SamplerProgram

log = logging.getLogger("comfy_xdit")

EVALUATION_PATIENCE_S = 600.0
"""How long one evaluation may take before the workers are restarted; the pool's own limit is for one message."""

RENAMED = {"timesteps": "timestep", "t": "timestep"}
"""ComfyUI's models name the same argument differently; messages use one name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What a run needs on the workers before its first call: a model, and patches under an id.

    patches: called when the workers don't hold them yet: encoding a large LoRA takes time.
    param_bytes: of one parameter as the workers keep it, on average, patches included.
    """

    model: m.LoadModel
    patches_id: str
    patches: Callable[[], list[m.Patch]]
    param_bytes: float

    def spread(self, spec: ParallelSpec) -> Load:
        """The same for these degrees: each rank loads its part."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, spec=spec))


def poll() -> None:
    """Raise ComfyUI's interruption when the user asked for it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class RemoteModel:
    """The diffusion transformer of one checkpoint, evaluated by a pool.

    One for each skeleton, shared by all clones of its MODEL. residency: which pools hold the model.
    """

    def __init__(self) -> None:
        self.residency = Residency("model")
        self._signature: inspect.Signature | None = None
        self._run: Run | None = None
        self._room: dict[str, int | None] = {}

    def stand_in(self, transformer: Any) -> None:
        """Have the evaluations of ComfyUI's transformer come here."""
        # SD3's transformer has no `_forward`: there the whole `forward` is replaced.
        name = "_forward" if hasattr(transformer, "_forward") else "forward"
        parameters = list(inspect.signature(getattr(type(transformer), name)).parameters.values())[1:]
        self._signature = inspect.Signature(parameters)
        setattr(transformer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's output for ComfyUI's arguments, on x's device."""
        run = self._needed_run()
        call, options = self._arguments(*args, **kwargs)
        chunks = len(options.get("cond_or_uncond", ())) or 1
        return self._given_back(run.evaluate(call, chunks), call)

    def _needed_run(self) -> Run:
        if self._run is None:
            raise ValueError(
                "a model on the pool was called outside of a sampler; use a node that samples with it (one of a "
                "guider's models can be on the pool), or the MODEL in front of Parallel Model (xDiT)"
            )
        return self._run

    def _bound(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by their names, in the order of the signature."""
        assert self._signature is not None
        bound = self._signature.bind(*args, **kwargs).arguments
        for parameter in self._signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        return bound

    def _arguments(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What goes to the workers, and ComfyUI's options. Raises ValueError for what can't."""
        bound = self._bound(*args, **kwargs)
        options = bound.pop("transformer_options", None) or {}
        call = {RENAMED.get(name, name): value for name, value in bound.items() if value is not None}
        if "control" in call:
            raise ValueError("a ControlNet can't run on the pool yet; use the stock sampler for it")
        refuse_options(options)
        return call, options

    def _given_back(self, output: Tensor, call: dict[str, Any]) -> Any:
        """What ComfyUI expects of its transformer, of what the workers answered."""
        return output.to(call["x"].device)

    def has_patches(self, transformer: Any, noise: Tensor, conds: list[dict[str, Any]]) -> bool:
        """Whether PipeFusion can cut a whole run's latent into patches, as the workers will find."""
        return True

    @property
    def run(self) -> Run | None:
        """The sampling run in progress."""
        return self._run

    @contextlib.contextmanager
    def answered_by(self, run: Any) -> Iterator[Any]:
        """Let `run.evaluate` answer the calls for a while, in place of the workers."""
        before, self._run = self._run, run
        try:
            yield run
        finally:
            self._run = before

    @contextlib.contextmanager
    def running(
        self, pool: Pool, load: Load, choose: Callable[[int], ParallelSpec], *, trace: bool = False
    ) -> Iterator[Run]:
        """A sampling run on `pool`: its lease, the model and its patches on the workers.

        choose: number of chunks → degrees; called first of all, so that what doesn't fit is said
        before a worker is touched. trace: what the workers did is written to ComfyUI's output folder.
        Raises ValueError, PoolError, or ComfyUI's interruption.
        """
        before = self._run
        with pool.lease(poll=poll):
            self._bring(pool, load)
            run = Run(pool, load, choose, trace=trace)
            self._run = run
            try:
                yield run
                run.end()
            finally:
                self._run = before

    def make_room(self, pool: Pool, load: Load) -> int | None:
        """Have ComfyUI give its memory to a pool that does not hold the model yet.

        Returns the bytes that every rank had for the model then, or when it was loaded: a choice must not change with
        what comes and goes beside it. None: not known.
        """
        found = make_room(pool, self.residency, load.model.model)
        if found is not None:
            self._room[pool.name] = min(found.values(), default=None)
        return self._room.get(pool.name)

    def _bring(self, pool: Pool, load: Load) -> None:
        """Make the model and its patches resident; what the workers hold already is not sent again.

        The workers say which patches they hold: another MODEL of the same file may have changed them.
        """
        self.residency.add(pool, load.model.model)
        if load.model.source is not None:
            use_this_comfyui(pool)
        held = [status["patches_id"] for status in _made_resident(pool, load.model)]
        # One rank may have failed where the others did not.
        if any(patches_id != load.patches_id for patches_id in held):
            patches = m.SetPatches(model=load.model.model, patches_id=load.patches_id, patches=load.patches())
            _say_misfits(patches, pool.call(patches, poll=poll).value["misfits"])


def use_this_comfyui(pool: Pool) -> None:
    """Have the workers import this ComfyUI's classes, if they haven't."""
    message = use_comfy()
    assert message is not None, "no MODEL is described for workers that can't have its class"
    same_everywhere(pool.call_all(message, poll=poll))


def _say_misfits(message: m.SetPatches, misfits: list[list[str]]) -> None:
    """A line for each patch that was left out, as ComfyUI itself writes it."""
    kinds = {patch.key: patch.kind for patch in message.patches}
    for key, why in misfits:
        log.error("ERROR %s %s%s %s", kinds.get(key, "patch"), MODEL, key, why)


def _made_resident(pool: Pool, message: m.LoadModel) -> list[dict[str, Any]]:
    """The model's status on each worker; what else they hold makes room for it when it must."""
    if pool.network is not None:
        message = dataclasses.replace(message, fingerprint=fingerprint(message.path))
    try:
        return [result.value for result in pool.call_all(message, poll=poll)]
    except PoolError as error:
        if error.kind != "memory":
            raise
        log.info("pool %s has no room for the model beside what it holds: unloading that", pool.name)
    pool.call(m.Unload(keys=[]), poll=poll)
    return [result.value for result in pool.call_all(message, poll=poll)]


def _longest_silence(program: SamplerProgram) -> int:
    """Evaluations between two previews at most; one more, as a pipeline's previews come late."""
    ends = [-1, *sorted(preview.after for preview in program.previews), len(program.calls) - 1]
    return max(later - earlier for earlier, later in pairwise(ends)) + 1


class Run:
    """One sampling run: evaluates calls on the workers, sends what is constant once.

    is_whole: whether calls stand for a run whose steps are the workers'.
    """

    is_whole = False

    def __init__(self, pool: Pool, load: Load, choose: Callable[[int], ParallelSpec], *, trace: bool = False) -> None:
        self.pool = pool
        self._record = Record(pool.call_all) if trace else None
        self._call = self._record.call if self._record is not None else pool.call
        self._load = load
        self._choose = choose
        # Of the pool, not of this run: a run that refers to itself would outlive its lease, and the MODEL with it.
        self._constants = Constants(hold=partial(_hold, pool), drop=partial(_drop, pool))
        self.meeting: Meeting | None = None

    def evaluate(self, call: dict[str, Any], chunks: int) -> Tensor:
        """The output of one call; beside another one when two threads meet (see `together`)."""
        if self.meeting is not None:
            return self.meeting.bring((call, chunks))
        return self.send([(call, chunks)])[0]

    def send(self, calls: list[tuple[dict[str, Any], int]]) -> list[Tensor]:
        """The outputs of `calls`, one per call, from one message to the workers."""
        message = m.Denoise(
            model=self._load.model.model,
            patches_id=self._load.patches_id,
            spec=self.spec(sum(chunks for _, chunks in calls)),
            calls=[self._refer(call) for call, _ in calls],
            chunks=[chunks for _, chunks in calls],
        )
        return self._call(message, poll=poll).value

    def prepare(self, method: str, args: list[Any], named: dict[str, Any]) -> Tensor:
        """What the transformer's own method makes of conditioning on the workers."""
        load = self._load
        message = m.Preprocess(
            model=load.model.model, patches_id=load.patches_id, method=method, args=args, named=named
        )
        return self.pool.call(message, poll=poll).value

    def sample(
        self, job: SamplingJob, *, key: str, num_chunks: int, reuse: dict[str, int], poll: Callable[[], bool]
    ) -> Tensor:
        """The samples of a whole run, from one message to the workers.

        key: by which `Peek` and `Cancel` know it. num_chunks: conditionings that may run side by side.
        reuse: fields of `Sample` for methods that use activations again. poll: True when a preview has come.
        """
        message = m.Sample(
            job=key,
            model=self._load.model.model,
            patches_id=self._load.patches_id,
            spec=self.spec(num_chunks),
            program=job.program,
            noise=job.noise,
            latent=job.latent,
            mask=job.mask,
            noises=job.noises,
            conds=[self._refer(cond) for cond in job.conds],
            **reuse,  # type: ignore[arg-type]
        )
        limit_s = EVALUATION_PATIENCE_S * _longest_silence(job.program)
        samples = self._call(message, poll=poll, timeout_s=limit_s).value
        assert samples is not None, "only this client cancels its job, and then it does not wait"
        return samples

    def spec(self, num_chunks: int) -> ParallelSpec:
        """The degrees for so many conditionings at once."""
        return self._choose(num_chunks)

    def end(self) -> None:
        """Free what was held on the workers for this run, and write its record."""
        self._constants.clear()
        if self._record is not None:
            self._record.write()

    def _refer(self, call: dict[str, Any]) -> dict[str, Any]:
        moving = {name: call[name] for name in ("x", "timestep") if name in call}
        return {name: self._constant(name, value) for name, value in call.items() if name not in moving} | moving

    def _constant(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._constants.refer(name, value)
        if isinstance(value, (list, tuple)):
            return [self._constant(f"{name}.{i}", item) for i, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self._constant(f"{name}.{key}", item) for key, item in value.items()}
        return value


def _hold(pool: Pool, name: str, value: Tensor) -> None:
    pool.call(m.Hold(name=name, value=value), poll=poll)


def _drop(pool: Pool, names: list[str]) -> None:
    pool.call(m.Drop(names=names), poll=poll)
