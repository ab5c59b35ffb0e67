"""A real ComfyUI server with this node pack, on a base folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 240
RUN_TIMEOUT_S = 400
FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")


class ComfyServer:
    """A running server. base: its folder, with models/, custom_nodes/ and output/."""

    def __init__(self, url: str, base: Path, process: subprocess.Popen) -> None:
        self.url, self.base, self._process = url, base, process

    def read(self, route: str) -> bytes:
        with urllib.request.urlopen(self.url + route, timeout=30) as answer:
            return answer.read()

    def get(self, route: str) -> Any:
        return json.loads(self.read(route))

    def post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{route} was refused: {error.read().decode()[:4000]}") from None

    def run(self, prompt: dict[str, Any]) -> list[Path]:
        """The images that `prompt` saved. Raises AssertionError with ComfyUI's messages when it failed."""
        number = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[:6000]
                images = [image for output in entry["outputs"].values() for image in output.get("images", [])]
                return [self.base / "output" / image["subfolder"] / image["filename"] for image in images]
            assert self._process.poll() is None, f"ComfyUI ended: {self.log_end()}"
            time.sleep(0.2)
        raise AssertionError(f"no result in {RUN_TIMEOUT_S} s: {self.log_end()}")

    def log_end(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")[-4000:]


def environment(base: Path) -> dict[str, str]:
    """For the server and the command line alike: no GPU, one thread, pools below `base`."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "COMFY_XDIT_HOME": str(base / "pools"),
    }


def comfy_xdit(python: str, base: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [python, "-m", "comfy_xdit", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(base), capture_output=True, text=True, timeout=120, check=False
    )


def lay_out(base: Path) -> None:
    """ComfyUI's folders below `base`, with this checkout as the only node pack."""
    for folder in FOLDERS:
        (base / "models" / folder).mkdir(parents=True)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "comfy-xdit").symlink_to(ROOT)


@contextlib.contextmanager
def running(checkout: Path, python: str, base: Path) -> Iterator[ComfyServer]:
    """A server of `checkout` on `base`; ends it, and whatever it started in its process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, str(checkout / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    with open(base / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment(base), stdout=log, stderr=log, start_new_session=True
        )
    server = ComfyServer(f"http://127.0.0.1:{port}", base, process)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(server):
            assert process.poll() is None, f"ComfyUI ended: {server.log_end()}"
            assert time.monotonic() < deadline, f"ComfyUI is not up: {server.log_end()}"
            time.sleep(0.3)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(server: ComfyServer) -> bool:
    try:
        server.get("/system_stats")
    except OSError:
        return False
    return True
