"""A ComfyUI of our own for a while: started from a checkout, spoken to over HTTP, ended with its block."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.mount import ROOT

from . import assets

START_TIMEOUT_S = 180.0
RUN_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.1
LOG_LINES = 12
MODEL_FOLDERS = ("diffusion_models", "vae", "loras", "conditioning")


class Server:
    """A running ComfyUI. url: of its HTTP API; output: the folder that its pictures go to."""

    def __init__(self, url: str, output: Path) -> None:
        self.url = url
        self.output = output

    def run(self, prompt: dict[str, Any]) -> list[Path]:
        """Queue an API-format workflow and wait; the pictures that it saved.

        Raises ValueError with ComfyUI's words when it refuses the workflow or a node fails.
        """
        number = self._post("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                return self._pictures(entry)
            time.sleep(POLL_S)
        raise ValueError(f"ComfyUI did not finish a workflow of the demo in {RUN_TIMEOUT_S:.0f} s")

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise ValueError(f"ComfyUI refuses the demo's workflow: {error.read().decode()[:2000]}") from None

    def _pictures(self, entry: dict[str, Any]) -> list[Path]:
        if entry["status"]["status_str"] != "success":
            errors = [about for kind, about in entry["status"]["messages"] if kind == "execution_error"]
            said = f"{errors[0]['node_type']}: {errors[0]['exception_message']}" if errors else "no reason given"
            raise ValueError(f"ComfyUI could not run the demo's workflow: {said.strip()}")
        saved = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [self.output / image["subfolder"] / image["filename"] for image in saved]


@contextlib.contextmanager
def serve(checkout: Path, python: str | None, folder: Path, *, cpu: bool) -> Iterator[Server]:
    """ComfyUI on a free port of 127.0.0.1, with our nodes and the demo's models; it ends with the block.

    folder: for its log, settings and pictures. Raises ValueError when it doesn't come up.
    """
    if not (checkout / "main.py").is_file() or not (checkout / "comfy" / "sd.py").is_file():
        raise ValueError(f"{checkout} is no ComfyUI checkout: it has no main.py and comfy/sd.py")
    if not (ROOT / "nodes" / "loader.py").is_file():
        raise ValueError(f"{ROOT} has no nodes: run the demo from a checkout of comfy-xdit")
    for name in ("output", "user", "temp", "input"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python or _python_of(checkout), "main.py", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-auto-launch", "--extra-model-paths-config", str(_extra_paths(checkout, folder))]
    for name in ("output", "user", "temp", "input"):
        command += [f"--{name}-directory", str(folder / name)]
    log_file = folder / "comfyui.log"
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            command + ["--cpu"] * cpu,
            cwd=checkout,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", folder / "output")
        _wait(server, process, log_file)
        yield server
    finally:
        _end(process)


def _python_of(checkout: Path) -> str:
    """The Python that has the checkout's requirements: of its virtual environment, else ours."""
    for venv in (".venv", "venv"):
        for python in (checkout / venv / "bin" / "python", checkout / venv / "Scripts" / "python.exe"):
            if python.exists():
                return str(python)
    return sys.executable


def _extra_paths(checkout: Path, folder: Path) -> Path:
    """A configuration that adds the demo's models and, where the checkout lacks them, our nodes."""
    # JSON is YAML, and spares us quoting.
    paths = {name: str(assets.FOLDER) for name in MODEL_FOLDERS}
    nodes = checkout / "custom_nodes"
    if not any(entry.resolve() == ROOT for entry in nodes.iterdir() if entry.is_dir()):
        ours = folder / "custom_nodes"
        ours.mkdir(exist_ok=True)
        link = ours / "comfy-xdit"
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        paths["custom_nodes"] = str(ours)
    file = folder / "extra_model_paths.yaml"
    file.write_text(json.dumps({"comfy_xdit_demo": paths}))
    return file


def _wait(server: Server, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = " | ".join(log_file.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise ValueError(f"ComfyUI ended at its start with status {process.returncode}: {said}")
        with contextlib.suppress(OSError):
            server.get("/system_stats")
            return
        time.sleep(POLL_S)
    raise ValueError(f"ComfyUI was not up after {START_TIMEOUT_S:.0f} s; see {log_file}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
