"""What goes wrong in `bench chaos`: each fault strikes once, while a job runs, and is mended after it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_xdit.pool.errors import PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.stop import stop

from .chaos_jobs import VERSIONS, Job, Models

if TYPE_CHECKING:
    from .chaos_client import OtherClient

LONGEST_PAUSE_S = 2.0
"""Of a process that is stopped and goes on: less than what the pool takes for dead."""


@dataclasses.dataclass(kw_only=True)
class Scene:
    """What a fault can reach. worker_pids, supervisor_pid: before it. other: a client in a process of its own."""

    pool_name: str
    models: Models
    home: Path
    job: Job
    chance: random.Random
    worker_pids: list[int]
    supervisor_pid: int
    other: OtherClient
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)


Act = Callable[[Scene], None]


def nothing(scene: Scene) -> None:
    """No fault."""


def kill_worker(scene: Scene) -> None:
    _signal(scene.chance.choice(scene.worker_pids), signal.SIGKILL)


def terminate_worker(scene: Scene) -> None:
    _signal(scene.chance.choice(scene.worker_pids), signal.SIGTERM)


def kill_all_workers(scene: Scene) -> None:
    for pid in scene.worker_pids:
        _signal(pid, signal.SIGKILL)


def pause_worker(scene: Scene) -> None:
    _pause(scene.chance.choice(scene.worker_pids), scene.chance)


def pause_supervisor(scene: Scene) -> None:
    _pause(scene.supervisor_pid, scene.chance)


def kill_supervisor(scene: Scene) -> None:
    _signal(scene.supervisor_pid, signal.SIGKILL)


def stop_pool(scene: Scene) -> None:
    # Another round's fault may have ended it already.
    with contextlib.suppress(ConnectionError, PoolError):
        stop(scene.pool_name)


def cancel(scene: Scene) -> None:
    scene.cancelled.set()


def remove_coordinator(scene: Scene) -> None:
    pool_folder(scene.pool_name).socket.unlink(missing_ok=True)


def remove_folder(scene: Scene) -> None:
    shutil.rmtree(pool_folder(scene.pool_name).path, ignore_errors=True)


def delete_file(scene: Scene) -> None:
    scene.models.path(scene.job.family).unlink(missing_ok=True)


def truncate_file(scene: Scene) -> None:
    path = scene.models.path(scene.job.family)
    os.truncate(path, path.stat().st_size // 2)


def restore_file(scene: Scene) -> None:
    if scene.models.version(scene.job.family) is None:
        scene.models.restore(scene.job.family, VERSIONS[0])


def replace_file(scene: Scene) -> None:
    scene.models.restore(scene.job.family, _other_version(scene))


def overwrite_file(scene: Scene) -> None:
    scene.models.overwrite(scene.job.family, _other_version(scene))


def fill_disk(scene: Scene) -> None:
    with contextlib.suppress(OSError), open(scene.home / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(1 << 16)):
            pass


def empty_disk(scene: Scene) -> None:
    (scene.home / "filler").unlink(missing_ok=True)


def disconnect_other(scene: Scene) -> None:
    scene.other.kill()


def pause_other(scene: Scene) -> None:
    _pause(scene.other.pid, scene.chance)


def _other_version(scene: Scene) -> str:
    return VERSIONS[scene.models.version(scene.job.family) == VERSIONS[0]]


def _signal(pid: int, number: int) -> None:
    # It may have ended meanwhile, of another's end.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _pause(pid: int, chance: random.Random) -> None:
    _signal(pid, signal.SIGSTOP)
    try:
        time.sleep(chance.uniform(0.05, LONGEST_PAUSE_S))
    finally:
        _signal(pid, signal.SIGCONT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """strike: on a thread of its own, while the job runs. mend: after the job, before the next. must_end_right: the
    fault is none of this job's, which must not feel it. with_other: another client runs jobs beside it. needs_disk: of
    a small size of its own.
    """

    strike: Act
    mend: Act = nothing
    must_end_right: bool = False
    with_other: bool = False
    needs_disk: bool = False


FAULTS: dict[str, Fault] = {
    "none": Fault(strike=nothing, must_end_right=True),
    "kill a worker": Fault(strike=kill_worker),
    "kill all workers": Fault(strike=kill_all_workers),
    "terminate a worker": Fault(strike=terminate_worker),
    "stop and continue a worker": Fault(strike=pause_worker, must_end_right=True),
    "stop and continue the supervisor": Fault(strike=pause_supervisor),
    "kill the supervisor": Fault(strike=kill_supervisor),
    "pool stop": Fault(strike=stop_pool),
    "cancel": Fault(strike=cancel),
    "remove the coordinator's socket": Fault(strike=remove_coordinator),
    "remove the pool's folder": Fault(strike=remove_folder),
    "delete the model's file": Fault(strike=delete_file, mend=restore_file),
    "truncate the model's file": Fault(strike=truncate_file, mend=restore_file),
    "replace the model's file": Fault(strike=replace_file),
    "overwrite the model's file": Fault(strike=overwrite_file),
    "fill the disk": Fault(strike=fill_disk, mend=empty_disk, needs_disk=True),
    "two clients": Fault(strike=nothing, with_other=True, must_end_right=True),
    "disconnect the other client": Fault(strike=disconnect_other, with_other=True, must_end_right=True),
    "stop and continue the other client": Fault(strike=pause_other, with_other=True, must_end_right=True),
}
