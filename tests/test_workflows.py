"""The bundled workflows fit the nodes' schemas, can be turned into prompts, and show what they are."""

import copy
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROMPT = runpy.run_path(str(ROOT / "workflows" / "prompt.py"))
inputs, to_prompt, widgets = (PROMPT[name] for name in ("inputs", "to_prompt", "widgets"))
TOOLS = runpy.run_path(str(HERE / "object_info.py"))
FOLDERS, NOTES, WORKFLOWS = TOOLS["FOLDERS"], TOOLS["NOTES"], TOOLS["WORKFLOWS"]
OBJECT_INFO = json.loads(TOOLS["SNAPSHOT"].read_text("utf-8"))
PUBLISHED = {
    "ae.safetensors",
    "clip_g.safetensors",
    "clip_l.safetensors",
    "flux1-dev.safetensors",
    "Hyper-FLUX.1-dev-8steps-lora.safetensors",
    "sd3.5_medium.safetensors",
    "t5xxl_fp16.safetensors",
}
"""The names under which the models' makers, or ComfyUI's, publish them: what users have on their disks."""


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def workflow(path) -> dict:
    return read(path)


def served(workflow: dict) -> list[dict]:
    """The nodes that the server knows: all but the notes."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def test_there_are_workflows_for_each_way_in():
    used = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    assert {
        "XDiTWorkerPool",
        "XDiTLoadDiffusionModel",
        "XDiTParallelModel",
        "XDiTKSampler",
        "XDiTVAEDecode",
        "LoraLoaderModelOnly",
        "SamplerCustomAdvanced",
    } <= used
    assert TOOLS["node_types"]([read(path) for path in WORKFLOWS]) == list(OBJECT_INFO)


def test_widget_values_fit_the_schema(workflow):
    for node in served(workflow):
        schema = OBJECT_INFO[node["type"]]
        names = widgets(schema)
        assert len(node["widgets_values"]) == len(names), node["type"]
        for name, value in zip(names, node["widgets_values"], strict=True):
            if name == "control_after_generate":
                assert value == "fixed", "an example gives the same image every time"
            else:
                assert fits(value, *inputs(schema)[name], is_file=name in FOLDERS), (
                    node["type"],
                    name,
                    value,
                )


def fits(value: object, kind: str, options: dict, *, is_file: bool) -> bool:
    """Whether the node takes `value` for an input of this type."""
    if is_file:
        return value in PUBLISHED
    if kind == "COMBO":
        return value in options["options"]
    if kind == "STRING":
        return isinstance(value, str)
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or (kind == "FLOAT" and isinstance(value, float))) and options["min"] <= value <= options["max"]


def test_links_join_what_exists_and_agree_on_the_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) == workflow["last_link_id"]
    for link, source, out, target, into, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert link in output["links"] and entry["link"] == link
        assert kind == output["type"] == entry["type"]
        assert OBJECT_INFO[nodes[source]["type"]]["output"][out] == kind
        assert inputs(OBJECT_INFO[nodes[target]["type"]])[entry["name"]][0] == kind
    told = Counter(link for node in nodes.values() for output in node["outputs"] for link in output["links"])
    heard = Counter(e["link"] for node in nodes.values() for e in node["inputs"] if e["link"] is not None)
    assert told == heard == Counter(link[0] for link in workflow["links"])


def test_every_required_input_is_given(workflow):
    prompt = to_prompt(workflow, OBJECT_INFO)
    assert len(prompt) == len(served(workflow))
    for node in prompt.values():
        schema = OBJECT_INFO[node["class_type"]]
        assert set(schema["input"]["required"]) <= set(node["inputs"]) <= set(inputs(schema))
    assert any(node["class_type"] == "SaveImage" for node in prompt.values())


def test_sockets_are_the_schemas(workflow):
    for node in served(workflow):
        schema = OBJECT_INFO[node["type"]]
        sockets = {name: kind for name, (kind, _) in inputs(schema).items() if name not in widgets(schema)}
        assert {entry["name"]: entry["type"] for entry in node["inputs"]} == sockets
        assert [output["type"] for output in node["outputs"]] == schema["output"][: len(node["outputs"])]


def test_files_say_where_to_get_them(workflow):
    for node in served(workflow):
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        for name, value in zip(widgets(OBJECT_INFO[node["type"]]), node["widgets_values"], strict=True):
            if name in FOLDERS:
                assert models[value]["directory"] == FOLDERS[name]
                assert models[value]["url"].startswith("https://huggingface.co/")
                assert models[value]["url"].endswith(f"/{value}")


def test_a_note_explains_and_our_nodes_stand_out(workflow):
    notes = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert notes and len(notes[0]["widgets_values"][0]) > 200
    ours = [node for node in workflow["nodes"] if node["type"].startswith("XDiT")]
    assert ours and all("bgcolor" in node for node in ours)
    assert len(workflow["groups"]) >= 3


def test_no_two_nodes_overlap(workflow):
    title = 30
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in workflow["nodes"]]
    for number, (x, y, width, height, kind) in enumerate(boxes):
        for x2, y2, width2, height2, other in boxes[number + 1 :]:
            apart = x + width <= x2 or x2 + width2 <= x or y + height <= y2 - title or y2 + height2 <= y - title
            assert apart, f"{kind} lies on {other}"


def test_the_thumbnail_shows_this_workflow(path, workflow):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 60_000
    with Image.open(thumbnail) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 400
        drawn = picture.info["comment"].decode()
    digest = runpy.run_path(str(ROOT / "workflows" / "thumbnails.py"))["digest"]
    assert drawn == digest(workflow), "stale: run python workflows/thumbnails.py"


def test_a_prompt_names_widgets_and_links():
    workflow = read(ROOT / "workflows" / "sd3.5-cfg-two-gpus.json")
    prompt = to_prompt(workflow, OBJECT_INFO)
    by_type = {node["class_type"]: (number, node["inputs"]) for number, node in prompt.items()}
    pool, sampler = by_type["XDiTWorkerPool"], by_type["XDiTKSampler"]
    assert pool[1] == {
        "devices": "auto",
        "dp": 0,
        "cfg": 2,
        "pipe": 0,
        "ring": 0,
        "ulysses": 0,
        "tensor": 0,
        "name": "default",
        "sampling": "auto",
        "distri": 1,
        "num_patches": 0,
        "warmup_steps": 1,
        "balance": "time",
        "trace": False,
    }
    assert sampler[1]["pool"] == [pool[0], 0]
    assert (sampler[1]["steps"], sampler[1]["sampler_name"], sampler[1]["denoise"]) == (28, "dpmpp_2m", 1.0)
    assert "control_after_generate" not in sampler[1]
    checkpoint = by_type["CheckpointLoaderSimple"][0]
    assert by_type["XDiTVAEDecode"][1]["vae"] == [checkpoint, 2]


def test_a_workflow_that_cannot_become_a_prompt_is_refused():
    workflow = read(ROOT / "workflows" / "flux-lora-parallel.json")
    number = next(i for i, node in enumerate(workflow["nodes"]) if node["type"] == "XDiTKSampler")

    def broken(**changes: object) -> dict:
        changed = copy.deepcopy(workflow)
        changed["nodes"][number] |= changes
        return changed

    with pytest.raises(ValueError, match=r"\(NoSuchNode\) is unknown to this ComfyUI; install"):
        to_prompt(broken(type="NoSuchNode"), OBJECT_INFO)
    with pytest.raises(ValueError, match="muted or bypassed"):
        to_prompt(broken(mode=4), OBJECT_INFO)
    with pytest.raises(ValueError, match=r"has 2 widget values, its schema 7: seed, control_after_generate, st"):
        to_prompt(broken(widgets_values=[1, "fixed"]), OBJECT_INFO)


def test_a_snapshot_that_no_longer_fits_is_told():
    differences = TOOLS["differences"]
    assert differences(OBJECT_INFO, OBJECT_INFO) == []
    later = copy.deepcopy(OBJECT_INFO)
    later["KSamplerSelect"]["input"]["required"]["sampler_name"][0].append("new_sampler")
    later["SaveImage"]["output"] = ["IMAGE"]
    assert differences(OBJECT_INFO, later) == []
    later["XDiTKSampler"]["input"]["required"]["steps"][1]["default"] = 30
    later["XDiTParallelModel"]["input"]["required"]["precision"] = ["STRING", {}]
    later["VAELoader"]["output"] = ["MODEL"]
    assert differences(OBJECT_INFO, later) == [
        "VAELoader: outputs ['MODEL'] instead of ['VAE']",
        "XDiTKSampler.steps: default 30 instead of 20",
        "XDiTParallelModel: required inputs ['model', 'precision'] instead of ['model']",
    ]
