"""Which of ComfyUI's templates a pool runs: a package of a few workflows, read and judged by its names."""

import json
import re

import pytest

from comfy_xdit.cli import main
from comfy_xdit.errors import InputError
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.templates.graph import templates
from comfy_xdit.templates.names import CARRIED, CONDITIONS, OF_FILES, family_of_file
from comfy_xdit.templates.verdicts import is_sampling, share, verdict


def loader(file, **more):
    note = {"name": file, "directory": "diffusion_models"}
    return {"type": "UNETLoader", "properties": {"models": [note]}, "widgets_values": [file, "default"], **more}


def patch(kind, what="MODEL", **more):
    return {"type": kind, "inputs": [{"type": what}], "outputs": [{"type": what}], **more}


SAMPLER = {"type": "KSampler"}
GRAPHS = {
    "wan": [loader("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"), patch("ModelSamplingSD3"), SAMPLER],
    "control": [loader("qwen_image_fp8.safetensors"), patch("ControlNetApplyAdvanced", "CONDITIONING"), SAMPLER],
    "muted": [loader("flux1-dev.safetensors"), patch("NAGuidance", mode=4), SAMPLER],
    "strange": [loader("brand_new.safetensors"), SAMPLER],
    "masked": [loader("sam3.1_multiplex_fp16.safetensors"), loader("z_image_turbo_bf16.safetensors"), SAMPLER],
    "cloud": [{"type": "VeoSamplerNode"}],
}
USAGE = {"wan": 60, "control": 20, "muted": 10, "strange": 7, "masked": 3, "cloud": 1000}


@pytest.fixture
def package(tmp_path):
    for name, nodes in GRAPHS.items():
        # As in newer workflows: all in a subgraph, that the graph names by its id.
        graph = {"nodes": [{"type": "inner"}], "definitions": {"subgraphs": [{"id": "inner", "nodes": nodes}]}}
        (tmp_path / f"{name}.json").write_text(json.dumps(graph if name == "wan" else {"nodes": nodes}))
    entries = [{"name": name, "title": name.title(), "usage": usage} for name, usage in USAGE.items()]
    (tmp_path / "index.json").write_text(json.dumps([{"templates": [*entries, {"name": "gone", "usage": 5}]}]))
    return tmp_path


def test_verdicts(package):
    found = {one.name: verdict(one) for one in templates(package) if is_sampling(one)}
    assert list(found) == ["wan", "control", "muted", "strange", "masked"]
    assert {name: one.why for name, one in found.items()} == {
        "wan": "",
        "control": "node ControlNetApplyAdvanced",
        "muted": "",
        "strange": "no plan for brand_new.safetensors",
        "masked": "",
    }
    assert found["wan"].families == ("wan",) and found["masked"].families == ("z-image",)
    assert share(list(found.values())) == 0.73


def test_the_command(package, capsys):
    assert main(["check", "--templates", str(package)]) == 0
    assert capsys.readouterr().out.endswith("3 of 5 templates run; 73.0% of their usage\n")
    assert main(["check", "--templates", str(package), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["share_of_usage"] == 0.73 and len(table["rows"]) == 5


def test_a_folder_without_templates_is_a_sentence(tmp_path, capsys):
    with pytest.raises(InputError, match=r"index\.json"):
        templates(tmp_path)
    assert main(["check", "--templates", str(tmp_path)]) == 1
    assert "index.json" in capsys.readouterr().err


def test_names_lead_to_families_that_there_are():
    assert {family for _, family in OF_FILES if family} == FAMILIES.keys()
    assert all(re.compile(pattern) for pattern, _ in OF_FILES)
    assert family_of_file("wan2.2_s2v_14B_fp8_scaled.safetensors") == ""
    assert family_of_file("flux-2-klein-4b.safetensors") == "flux2"
    assert family_of_file("unheard.safetensors") is None
    assert not {name for name in CARRIED | CONDITIONS if "ControlNet" in name or "SkipLayer" in name}
