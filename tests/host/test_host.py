"""Runs the tests of `inside/` in each ComfyUI checkout, file by file."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from comfy_xdit_bench.hosts import ROOT, python_of

HERE = Path(__file__).resolve().parent
FILES = sorted(path.name for path in (HERE / "inside").glob("check_*.py"))


@pytest.mark.host
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES)
def test_inside(checkout, file, tmp_path):
    command = [python_of(checkout), "-m", "pytest", str(HERE / "inside" / file), "-q"]
    command += ["-o", "python_files=check_*.py", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/inside"]
    environment = dict(os.environ, COMFYUI_UNDER_TEST=str(checkout), OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1700)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, f"{' '.join(command)}\n{output[-8000:]}"
