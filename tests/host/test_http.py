"""Our nodes in a running ComfyUI, through its HTTP interface: schemas, results, interrupt, unloading, faults."""

import json
import os
import runpy
import signal
import time
from pathlib import Path

import pytest
import torch
from _pytest.pathlib import import_path
from comfy_xdit_bench.hosts import ROOT, python_of
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
host = import_path(HERE / "comfy_server.py", root=ROOT, mode="importlib", consider_namespace_packages=False)
TINY = runpy.run_path(str(ROOT / "tests" / "tiny.py"))
CONTEXT, POOLED = 64, 48

pytestmark = [pytest.mark.host, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(checkout, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    python = python_of(checkout)
    host.lay_out(base)
    write_files(base / "models")
    try:
        with host.running(checkout, python, base) as running:
            running.pool = lambda *words: host.comfy_xdit(python, base, "pool", *words)
            yield running
    finally:
        host.comfy_xdit(python, base, "pool", "stop")


def write_files(models):
    shapes = TINY["sd3_shapes"](heads=4, depth=4, context=CONTEXT, vec=POOLED, channels=16, side=32)
    save_file(TINY["random_weights"](shapes, 1), models / "diffusion_models" / "sd3.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for prompt, tokens in (("a", 20), ("b", 20), ("longer", 33)):
        tensors[f"{prompt}|context"] = torch.randn(1, tokens, CONTEXT, generator=generator)
        tensors[f"{prompt}|pooled"] = torch.randn(1, POOLED, generator=generator)
    (models / "conditioning").mkdir()
    save_file(tensors, models / "conditioning" / "prompts.safetensors")


def prompt(*, ours=True, stock_sampler=False, negative="b", steps=3, side=128, **degrees):
    """A workflow in API format that saves a latent; the stock nodes when not `ours`.

    stock_sampler: ComfyUI's loader and KSampler, with a Parallel Model between them.
    """
    # A name of its own for each file: ComfyUI runs no node again whose inputs are those of the last run.
    names = {axis: degrees.get(axis, 0) for axis in ("dp", "cfg", "pipe", "ring", "ulysses", "tensor")}
    sampling = {
        **{"seed": 5, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"},
        **{"denoise": 1.0, "model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0]},
        "latent_image": ["5", 0],
    }
    conditioning = {"file": "prompts.safetensors"}
    nodes = {
        "2": ("XDiTLoadDiffusionModel" if ours else "UNETLoader", {"unet_name": "sd3.safetensors"}),
        "3": ("XDiTLoadConditioning", {**conditioning, "prompt": "a"}),
        "4": ("XDiTLoadConditioning", {**conditioning, "prompt": negative}),
        "5": ("EmptySD3LatentImage", {"width": side, "height": side, "batch_size": 1}),
        "6": ("XDiTKSampler" if ours else "KSampler", sampling),
        "7": ("SaveLatent", {"samples": ["6", 0], "filename_prefix": f"{time.monotonic_ns()}"}),
    }
    nodes["2"][1]["weight_dtype"] = "default"
    if ours:
        nodes["1"] = ("XDiTWorkerPool", {"devices": "cpu:2", "name": "default", **names})
        sampling["pool"] = ["1", 0]
    if stock_sampler:
        nodes["2"] = ("UNETLoader", nodes["2"][1])
        nodes["6"] = ("KSampler", sampling)
        nodes["8"] = ("XDiTParallelModel", {"model": ["2", 0], "pool": sampling.pop("pool")})
        sampling["model"] = ["8", 0]
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


def start(server, **inputs):
    return server.post("/prompt", {"prompt": prompt(**inputs)})["prompt_id"]


def wait(server, number, timeout_s=300):
    """The history entry of a job that ended, well or not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        entry = server.get(f"/history/{number}").get(number)
        if entry is not None:
            return entry
        time.sleep(0.1)
    raise AssertionError(f"the job did not end: {server.log_end()}")


def latent(server, **inputs):
    """The latent of a job that ended well."""
    for old in (server.base / "output").glob("*.latent"):
        old.unlink()
    entry = wait(server, start(server, **inputs))
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[:4000]
    (file,) = (server.base / "output").glob("*.latent")
    return load_file(file)["latent_tensor"]


def error(entry):
    """ComfyUI's own message about a node that failed."""
    (message,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    return message["exception_message"].strip()


def until(what, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def pool_status(server):
    """Without ranks before there is a pool."""
    return json.loads(server.pool("status", "--json").stdout or '{"ranks": []}')


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_every_input_is_explained(server):
    ours = {name: node for name, node in server.get("/object_info").items() if name.startswith("XDiT")}
    assert len(ours) >= 8
    for name, node in ours.items():
        assert node["description"] and node["category"] == "xDiT" and node["display_name"].endswith("(xDiT)")
        for group in node["input"].values():
            for label, definition in group.items():
                assert definition[1].get("tooltip"), f"{name}.{label} has no tooltip"


def test_help_pages(server):
    for name in server.get("/object_info"):
        if name.startswith("XDiT"):
            assert server.read(f"/extensions/comfy-xdit/docs/{name}.md").startswith(b"# ")


def test_inputs_are_the_stock_ones_and_a_pool(server):
    pairs = {
        "XDiTLoadDiffusionModel": "UNETLoader",
        "XDiTKSampler": "KSampler",
        "XDiTKSamplerAdvanced": "KSamplerAdvanced",
        "XDiTSamplerCustomAdvanced": "SamplerCustomAdvanced",
    }
    for ours, stock in pairs.items():
        mine, theirs = (server.get(f"/object_info/{name}")[name] for name in (ours, stock))
        assert list(mine["input"]["required"]) == list(theirs["input"]["required"])
        assert mine["output"] == theirs["output"]
        for label, definition in theirs["input"]["required"].items():
            default = definition[1].get("default") if len(definition) > 1 else None
            assert mine["input"]["required"][label][1].get("default") == default
        assert ours == "XDiTLoadDiffusionModel" or list(mine["input"]["optional"]) == ["pool"]


@pytest.mark.parametrize("degrees", [{}, {"cfg": 2}, {"ulysses": 2}, {"ring": 2}, {"tensor": 2}])
@pytest.mark.parametrize("negative", ["b", "longer"])
def test_equals_stock(server, degrees, negative):
    ours = latent(server, negative=negative, **degrees)
    assert close(ours, latent(server, ours=False, negative=negative))


STEP_BY_STEP, AS_A_WHOLE = {"steps": 2000}, {"steps": 1000}
"""By so many steps; as a whole each rank is at work from the beginning to the end."""

STAGES = {**AS_A_WHOLE, "pipe": 2, "stock_sampler": True}


@pytest.mark.parametrize("inputs", [STEP_BY_STEP, AS_A_WHOLE, STAGES], ids=str)
def test_interrupt(server, inputs):
    number = start(server, **inputs)
    until(lambda: any(rank.get("running") for rank in pool_status(server)["ranks"]))
    server.post("/interrupt", {})
    entry = wait(server, number, 60)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert latent(server, ulysses=2).isfinite().all()


def test_free_unloads_the_workers(server):
    expected = latent(server, ulysses=2)

    def are_loaded():
        return any(rank.get("models") for rank in pool_status(server)["ranks"])

    until(are_loaded)

    def is_freed():
        # Asked again: what comes while ComfyUI's loop is between looking and waiting it sees only 1,000 s later.
        server.post("/free", {"unload_models": True, "free_memory": True})
        return not are_loaded()

    until(is_freed)
    assert close(latent(server, ulysses=2, steps=3), expected)


@pytest.mark.parametrize(("rank", "inputs"), [(1, STEP_BY_STEP), (1, AS_A_WHOLE), (0, STAGES), (1, STAGES)], ids=str)
def test_a_killed_worker(server, rank, inputs):
    number = start(server, **inputs)
    until(lambda: [rank.get("running") in ("Sample", "Denoise") for rank in pool_status(server)["ranks"]] == [True] * 2)
    os.kill(pool_status(server)["ranks"][rank]["pid"], signal.SIGKILL)
    said = error(wait(server, number, 60))
    assert "the pool restarts its workers" in said and "\n" not in said, said
    assert latent(server, ring=2).isfinite().all()


@pytest.mark.parametrize(
    ("degrees", "sentence"),
    [
        ({"ulysses": 3}, "ulysses=3 makes 3 ranks, which do not divide the pool's 2"),
        ({"pipe": 8}, "pipe=8 makes 8 ranks, which do not divide the pool's 2"),
    ],
)
def test_degrees_that_do_not_fit(server, degrees, sentence):
    said = error(wait(server, start(server, **degrees)))
    assert sentence in said and "\n" not in said


def test_no_such_device(server):
    workflow = prompt()
    workflow["1"]["inputs"] |= {"devices": "cuda:9", "name": "other"}
    said = error(wait(server, server.post("/prompt", {"prompt": workflow})["prompt_id"]))
    assert "cuda:9" in said and "\n" not in said
