"""`draft-plan` on ComfyUI's own classes: families that have a plan get one anew, and it holds."""

import comfyui_version
import native_models as make
import pytest
from comfy_xdit_nodes.native.options import use_comfy

from comfy_xdit.cli import draft_plan
from comfy_xdit.native.drafting.written import draft
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.selftest import selftest, verdict
from comfy_xdit.native.subject import exists
from comfy_xdit.native.subjects import SUBJECTS

pytestmark = [
    pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes"),
    pytest.mark.usefixtures("one_thread"),
]

DRAFTED = [
    name
    for name in ("krea2", "z-image", "qwen-image", "cosmos", "sd3")
    if any(exists(kind) for kind in FAMILIES[name].kinds)
]


@pytest.mark.parametrize("name", DRAFTED)
def test_a_known_family_is_drafted_anew(name):
    subjects = [subject for subject in SUBJECTS[name] if exists(subject.kind)]
    made = draft(name, subjects)
    outcomes = selftest(made.family, subjects)
    assert outcomes and not verdict(made.family, outcomes, comfyui_version.__version__)
    known = FAMILIES[name]
    assert {*made.family.rows, *made.family.constants} == {*known.rows, *known.constants}
    assert made.family.options == known.options
    assert [blocks.gives for blocks in made.family.plan.blocks] == [blocks.gives for blocks in known.plan.blocks]


def test_subjects_to_begin_with(tmp_path):
    path = make.save(tmp_path / "wan.safetensors", make.weights(make.wan()))
    (tmp_path / "mine.py").write_text(draft_plan._first_subjects(str(path)))
    name, (subject,) = draft_plan._subjects_of(str(tmp_path / "mine.py"))
    assert name == "mine" and subject.kind == "WAN21_T2V"
    wanted = {key: value for key, value in make.wan().unet_config.items() if key in subject.config}
    assert subject.config["dim"] == 256 and {**subject.config, **wanted} == subject.config
    (tmp_path / "mine.py").write_text("SUBJECTS = ()")
    with pytest.raises(ValueError, match=r"mine\.py has no SUBJECTS"):
        draft_plan._subjects_of(str(tmp_path / "mine.py"))
