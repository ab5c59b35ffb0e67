"""A pool's folder may be deleted, its disk full, its coordinator crowded: no pool is lost or doubled by that."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

from fault_service import Echo, Reduce
from harness import NAME, OPTIONS, private_home, private_pool, stop_process, wait_until, wait_until_gone, worker_pids
from played import played_coordinator

from comfy_xdit import cli
from comfy_xdit.pool import start as start_module
from comfy_xdit.pool.client import Pool, PoolError, status
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.locks import Lock, holders
from comfy_xdit.pool.pace import LONGEST_PAUSE_S, Pace
from comfy_xdit.pool.wire import Wire

HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def delete_socket(folder):
    folder.socket.unlink()


def replace_socket(folder):
    folder.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder.socket))


def delete_files(folder):
    for path in folder.path.iterdir():
        path.unlink()


def delete_folder(folder):
    shutil.rmtree(folder.path)


def delete_home(folder):
    shutil.rmtree(folder.path.parent)


@pytest.mark.parametrize("damage", [delete_socket, replace_socket, delete_files, delete_folder, delete_home])
def test_a_pool_whose_files_are_deleted_is_found_again_and_works(damage):
    with private_pool() as pool:
        assert pool.call(Reduce(value=1.0)).value == 2.0
        supervisor, generation, folder = pool.status()["pid"], pool.generation, pool_folder(NAME)
        damage(folder)
        found = wait_until(lambda: _status(), "the pool at its place")
        assert found["pid"] == supervisor
        other = Pool.connect(NAME, "auto", start=True)
        try:
            # Its workers start anew where their own file was deleted.
            wait_until(lambda: status(NAME)["state"] == "ready", "workers that can meet")
            assert other.call(Reduce(value=2.0)).value == 4.0
            assert other.generation > generation and other.status()["pid"] == supervisor
        finally:
            other.close()
        assert "is made anew" in folder.log.read_text()
        assert folder.path.stat().st_mode & 0o777 == 0o700
        pids = [supervisor, *worker_pids(pool)]
        assert cli.main(["pool", "stop", "--name", NAME]) == 0
        wait_until_gone(pids)


def _status():
    with contextlib.suppress(PoolError):
        return status(NAME)


def test_a_ghost_that_hangs_is_told_and_can_be_stopped(monkeypatch, capsys):
    monkeypatch.setattr(start_module, "EARLIER_LIMIT_S", 0.5)
    with private_pool() as pool:
        pool.call(Echo(value=1))
        pids = [pool.status()["pid"], *worker_pids(pool)]
        stop_process(pids[0])
        delete_folder(pool_folder(NAME))
        assert holders(pool_folder(NAME).lock("alive").path) == pids[:1]
        sentence = (
            rf"an earlier pool 'test' \(process {pids[0]}\) still runs, but can't be reached.*`comfy-xdit pool stop"
        )
        with pytest.raises(PoolError, match=sentence):
            Pool.connect(NAME, "cpu:1", **OPTIONS)
        assert cli.main(["pool", "stop", "--name", NAME]) == 0
        wait_until_gone(pids)
        assert capsys.readouterr().out == f"pool {NAME!r} and its workers ended\n"
        pool.close()
        assert pool.call(Reduce(value=1.0)).value == 2.0


def test_of_two_pools_of_one_name_the_one_without_the_folder_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "h"))
    ended = []
    with played_coordinator(1) as coordinator:
        coordinator._stop = lambda: ended.append(True)
        path = coordinator.folder.lock("alive").path
        # As one process would, so that the coordinator never sees the folder without a lock.
        other = tmp_path / "other"
        other.touch()
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(other)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout.readline() == b"held\n"
            assert not coordinator._stopping
            os.replace(other, path)
            wait_until(lambda: ended, "the end of the one without the folder")
            assert coordinator._stopping
            holder.stdin.close()


def test_who_holds_a_lock_is_found_also_when_its_file_is_gone(tmp_path):
    path = tmp_path / "x.lock"
    mine = Lock(path)
    assert mine.take() and mine.is_in_place and holders(path) == []
    assert not Lock(path).take()
    mine.release()
    assert not mine.is_in_place
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as one:
        assert one.stdout.readline() == b"held\n"
        assert not mine.take() and holders(path) == [one.pid]
        path.unlink()
        assert holders(path) == [one.pid]
        assert mine.take() and mine.is_in_place and holders(path) == [one.pid]
        path.unlink()
        assert not mine.is_in_place
        one.stdin.close()
    wait_until(lambda: not holders(path), "the end of its holder")


def test_a_lock_that_only_looks_open_is_held_by_nobody(tmp_path):
    path = tmp_path / "x.lock"
    path.touch()
    command = [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"]
    with subprocess.Popen([*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
        assert one.stdout.readline() == b"open\n"
        assert holders(path) == []
        one.stdin.close()


# Restarts


def test_attempts_in_vain_come_ever_more_slowly():
    pace = Pace()
    pauses = []
    for _ in range(9):
        pauses.append(pace.pause_s)
        pace.began()
    assert pauses == [0.0, 0.0, 2.0, 4.0, 8.0, 16.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    pace.worked()
    assert pace.pause_s == 0.0


# A crowd at the coordinator, and a start that fails


def test_a_crowded_coordinator_is_a_pool_that_runs_and_its_log_stays(monkeypatch):
    monkeypatch.setattr(start_module, "HELLO_TIMEOUT_S", 1.0)
    with private_pool() as pool, contextlib.ExitStack() as crowd:
        pool.call(Echo(value=1))
        folder, supervisor = pool_folder(NAME), pool.status()["pid"]
        said = folder.log.read_text()
        assert said
        stop_process(supervisor)
        with pytest.raises(BlockingIOError):
            while True:
                one = crowd.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(str(folder.socket))
        with pytest.raises(PoolError, match=r"pool 'test' does not answer; end it with `comfy-xdit pool stop"):
            start_module.say(folder, {"type": "status"}, timeout_s=0.5)
        with pytest.raises(PoolError, match="it started: another pool 'test' runs, or is just ending") as told:
            start_module.spawn(folder, ["cpu"], **OPTIONS)
        assert str(folder.path) not in str(told.value)
        assert folder.log.read_text() == said
        os.kill(supervisor, 18)
        assert pool.call(Reduce(value=1.0)).value == 2.0


def test_a_connection_waits_for_its_place_in_the_queue(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as crowd:
        listener.bind(str(path))
        listener.listen(0)
        crowd.callback(crowd.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path)) or (lambda: None))
        with pytest.raises(TimeoutError, match="lets nobody in"):
            Wire.connect(path, timeout_s=0.1)
        connection, _ = listener.accept()
        connection.close()
        Wire.connect(path, timeout_s=0.1).close()


# A full disk


@contextlib.contextmanager
def small_disk(path, size="1m"):
    """A file system of its own at `path`."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", path], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def filled(path):
    """As long as the block runs there is no room at `path`."""
    ballast = path / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


def test_a_full_disk_hinders_no_job_and_workers_that_need_room_say_so():
    with private_home() as home, small_disk(home / NAME):
        pool = Pool.connect(NAME, "cpu:2", **OPTIONS)
        try:
            assert pool.call(Reduce(value=1.0)).value == 2.0
            pids = worker_pids(pool)
            other = Pool.connect(NAME, "auto", start=False)
            with filled(home / NAME):
                # A lease of another client writes nothing that needs room.
                assert other.call(Reduce(value=1.0)).value == 2.0
            assert other.call(Reduce(value=3.0)).value == 6.0
            assert worker_pids(pool) == pids
            # Workers that must start anew can't, and say why.
            with filled(home / NAME):
                os.kill(pids[0], 9)
                with pytest.raises(PoolError, match="ended unexpectedly"):
                    other.call(Reduce(value=1.0))
                with pytest.raises(PoolError, match=r"No space left on device\); make room there"):
                    other.call(Reduce(value=1.0))
            wait_until(lambda: status(NAME)["state"] == "ready", "workers that find room")
            assert other.call(Reduce(value=4.0)).value == 8.0
            other.close()
        finally:
            pool.close()
            cli.main(["pool", "stop", "--name", NAME])


def test_a_pool_that_has_no_room_to_start_says_so():
    with private_home() as home, small_disk(home / NAME, size="16k"), filled(home / NAME):
        pool = Pool.connect(NAME, "cpu:1", **OPTIONS)
        with pytest.raises(PoolError, match=r"No space left on device\); make room there"):
            pool.call(Echo(value=1))
        pool.close()
        cli.main(["pool", "stop", "--name", NAME])
