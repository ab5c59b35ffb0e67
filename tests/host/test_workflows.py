"""The bundled workflows run in ComfyUI itself, on a pool, and give the images of ComfyUI alone."""

import json
import runpy
from pathlib import Path

import numpy
import pytest
from _pytest.pathlib import import_path
from comfy_xdit_bench.hosts import ROOT, python_of, version_of
from PIL import Image

HERE = Path(__file__).resolve().parent


def sibling(name: str):
    return import_path(HERE / f"{name}.py", root=ROOT, mode="importlib", consider_namespace_packages=False)


host, models = sibling("comfy_server"), sibling("workflow_models")
to_prompt = runpy.run_path(str(ROOT / "workflows" / "prompt.py"))["to_prompt"]
TOOLS = runpy.run_path(str(ROOT / "tests" / "object_info.py"))

pytestmark = [pytest.mark.host, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(checkout, tmp_path_factory):
    """A server of `checkout` with the tiny files and a pool of two processes."""
    base = tmp_path_factory.mktemp("comfyui")
    python = python_of(checkout)
    host.lay_out(base)
    models.write(base / "models", small_flux=has_small_flux(checkout))
    started = host.comfy_xdit(python, base, "pool", "start", "--devices", "cpu:2")
    try:
        assert started.returncode == 0, started.stderr
        with host.running(checkout, python, base) as running:
            yield running
    finally:
        host.comfy_xdit(python, base, "pool", "stop")


def has_small_flux(checkout: Path) -> bool:
    """ComfyUI reads Flux's sizes from the file since 0.3.71."""
    return tuple(int(part) for part in version_of(checkout).split(".")[:3]) >= (0, 3, 71)


def pixels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_schemas_are_those_that_the_workflows_were_made_for(server):
    kept = json.loads(TOOLS["SNAPSHOT"].read_text("utf-8"))
    now = TOOLS["snapshot"]({name: server.get(f"/object_info/{name}")[name] for name in kept}, list(kept))
    assert TOOLS["differences"](kept, now) == [], "renew it: python tests/object_info.py URL"


def test_comfyui_offers_them_as_templates_with_thumbnails(server):
    names = {path.stem for path in TOOLS["WORKFLOWS"]}
    assert names <= set(server.get("/workflow_templates")["comfy-xdit"])
    for name in names:
        assert server.read(f"/api/workflow_templates/comfy-xdit/{name}.jpg").startswith(b"\xff\xd8")


@pytest.mark.parametrize("path", TOOLS["WORKFLOWS"], ids=lambda path: path.stem)
def test_a_workflow_gives_comfyuis_own_image(server, path):
    workflow = json.loads(path.read_text("utf-8"))
    prompt = models.tiny(to_prompt(workflow, server.get("/object_info")))
    ours, alone = server.run(prompt), server.run(models.stock(prompt))
    assert len(ours) == len(alone) == 1
    image, expected = pixels(ours[0]), pixels(alone[0])
    assert image.std() > 5, "an image without content proves nothing"
    assert image.shape == (80, 112, 3)
    assert numpy.abs(image - expected).max() <= 1


def test_the_lora_of_the_workflow_changes_the_image(server):
    path = ROOT / "workflows" / "flux-lora-parallel.json"
    prompt = models.tiny(to_prompt(json.loads(path.read_text("utf-8")), server.get("/object_info")))
    with_lora = pixels(server.run(prompt)[0])
    loader = next(node for node in prompt.values() if node["class_type"] == "LoraLoaderModelOnly")
    loader["inputs"]["strength_model"] = 0.0
    without = pixels(server.run(prompt)[0])
    assert numpy.abs(with_lora - without).max() > 5
