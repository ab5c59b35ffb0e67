"""Families of ComfyUI's own classes: each plan equals one rank on this ComfyUI; what a family names was tried."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import comfy.sd
import comfyui_version
import native_models as make
import pytest
from comfy_xdit_nodes.native.options import use_comfy

from comfy_xdit.native import proof
from comfy_xdit.native.drafting.written import arguments_reached
from comfy_xdit.native.families import FAMILIES, family_of
from comfy_xdit.native.selftest import outcomes_of, selftest, verdict
from comfy_xdit.native.subject import as_text, build, cases, exists, from_text
from comfy_xdit.native.subjects import SUBJECTS, hunyuan
from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.tokens import Refused

log = logging.getLogger("comfy_xdit")

pytestmark = pytest.mark.usefixtures("one_thread")

is_new = pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")

KNOWN = {name: family for name, family in FAMILIES.items() if any(exists(kind) for kind in family.kinds)}


@is_new
@pytest.mark.parametrize("name", KNOWN)
def test_every_family_holds(name):
    outcomes = selftest(KNOWN[name], SUBJECTS[name])
    assert outcomes and not verdict(KNOWN[name], outcomes, comfyui_version.__version__)
    log.info("%s: %d calls, worst %.1e", name, len(outcomes), max(outcome.error for outcome in outcomes))


@is_new
@pytest.mark.parametrize("name", KNOWN)
def test_what_a_family_names_is_what_was_tried(name):
    """Whatever reaches the transformer is named, and whatever is named was there in a call."""
    family, named, options = KNOWN[name], set(), set()
    for subject in SUBJECTS[name]:
        if not exists(subject.kind):
            continue
        config = subject.configured()
        model = build(subject.kind, config)
        for call in subject.calls(config).values():
            named |= arguments_reached(model, call).keys()
            options |= call.get("transformer_options", {}).keys()
    assert named == set(family.rows) | set(family.constants)
    assert options == set(family.options)


def damaged(plan):
    """(what, the plan with one line gone, or with its streams in the other order)."""
    for at, blocks in enumerate(plan.blocks):

        def with_takes(takes, at=at, blocks=blocks):
            changed = dataclasses.replace(blocks, takes=takes)
            return dataclasses.replace(plan, blocks=(*plan.blocks[:at], changed, *plan.blocks[at + 1 :]))

        for name, rule in blocks.takes.items():
            if name not in blocks.gives:
                rest = {other: what for other, what in blocks.takes.items() if other != name}
                yield f"{blocks.path}: {name} gone", with_takes(rest)
            if not isinstance(rule, Refused) and len(rule.streams) > 1:
                turned = dataclasses.replace(rule, streams=rule.streams[::-1])
                yield f"{blocks.path}: {name} turned", with_takes({**blocks.takes, name: turned})
    for pattern, rule in plan.attention.items():
        rest = {other: what for other, what in plan.attention.items() if other != pattern}
        yield f"{pattern} gone", dataclasses.replace(plan, attention=rest)
        if rule.mask == "own":
            changed = {**plan.attention, pattern: dataclasses.replace(rule, mask="whole")}
            yield f"{pattern} with a whole mask", dataclasses.replace(plan, attention=changed)
    if plan.join:
        yield "join gone", dataclasses.replace(plan, join={})


@is_new
def test_every_damaged_line_is_refused():
    silent, num = [], 0
    for name, family in KNOWN.items():
        for what, plan in damaged(family.plan):
            num += 1
            found = outcomes_of(dataclasses.replace(family, plan=plan), SUBJECTS[name], [ParallelSpec(ulysses=2)])
            if all(outcome.holds for outcome in found):
                silent.append(f"{name} {what}")
    log.info("%d of %d damaged lines refused", num - len(silent), num)
    assert num > 80 and not silent


TURNED = {
    "torch.cat([txt_query, img_query]": "torch.cat([img_query, txt_query]",
    "torch.cat([txt_key, img_key]": "torch.cat([img_key, txt_key]",
    "torch.cat([txt_value, img_value]": "torch.cat([img_value, txt_value]",
    "attn_mask[:, 0, :seq_txt] =": "attn_mask[:, 0, seq_img:] =",
    "joint_hidden_states[:, :seq_txt, :]": "joint_hidden_states[:, seq_img:, :]",
    "joint_hidden_states[:, seq_txt:, :]": "joint_hidden_states[:, :seq_img, :]",
    "ids = torch.cat((txt_ids, img_ids)": "ids = torch.cat((img_ids, txt_ids)",
}
"""In Qwen-Image's class: the image first, then the text. On one rank nothing changes by it."""


def selftest_command(folder, *more):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "comfy_xdit", "selftest", "--comfyui", str(folder), *more]
    return subprocess.run(command, env=environment, cwd=Path(proof.__file__).parents[2], capture_output=True, text=True)


@is_new
def test_a_changed_comfyui_is_refused_by_name(tmp_path):
    here = Path(comfyui_version.__file__).parent
    for path in (*(here / "comfy").rglob("*"), here / "comfyui_version.py"):
        if path.suffix in (".py", ".json", ".txt", ".model"):
            (copy := tmp_path / path.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    for name in ("comfy_api", "comfy_execution", "comfy_config", "utils", "comfy_aimdo"):
        if (here / name).exists():
            (tmp_path / name).symlink_to(here / name)
    module = tmp_path / "comfy" / "ldm" / "qwen_image" / "model.py"
    text = module.read_text("utf-8")
    for old, new in TURNED.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    assert selftest_command(tmp_path, "--family", "qwen-image").returncode == 0
    module.unlink()
    module.write_text(text, "utf-8")
    done = selftest_command(tmp_path, "--family", "qwen-image")
    assert done.returncode == 1, done.stderr[-2000:]
    version = comfyui_version.__version__
    assert f"Qwen-Image is not run on several GPUs with ComfyUI {version}" in done.stdout


@is_new
def test_a_finding_is_kept(tmp_path, monkeypatch):
    results, folder = tmp_path / "selftest.json", use_comfy().folder
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path))
    real = {"Krea2": {**SUBJECTS["krea2"][0].config, "features": 6144, "heads": 48}}
    polls = []

    def why():
        return proof.why_refused(KNOWN["krea2"], real, folder, results, lambda: polls.append(1))

    assert why() == "" and polls
    assert proof.findings(results) == {proof.finding_key(KNOWN["krea2"], folder, real): ""}
    monkeypatch.setattr(proof, "_printed", None)
    assert why() == ""


@is_new
@pytest.mark.parametrize("make_config", [make.tiny.flux_config, make.qwen, make.wan])
def test_a_files_own_configuration_is_tried(make_config, tmp_path):
    """As ComfyUI detects it, but for its sizes."""
    path = make.save(tmp_path / "model.safetensors", make.weights(make_config()))
    config = comfy.sd.load_diffusion_model(str(path)).model.model_config
    kind = type(config).__name__
    family = family_of(kind)
    real = {kind: from_text(as_text(config.unet_config))}
    ((subject, tiny),) = cases(SUBJECTS[family.name], real)
    assert tiny.items() >= {name: subject.config[name] for name in subject.small}.items()
    outcomes = selftest(family, SUBJECTS[family.name], real=real)
    assert outcomes and not verdict(family, outcomes, comfyui_version.__version__)


@pytest.mark.skipif(use_comfy() is not None, reason="the order of its tokens is another one")
def test_hunyuan_video_of_another_order_is_refused():
    family = FAMILIES["hunyuan-video"]
    subject = SUBJECTS["hunyuan-video"][0]
    config = {name: value for name, value in subject.config.items() if name not in hunyuan.NEWER}
    outcomes = selftest(family, [dataclasses.replace(subject, config=config)])
    why = verdict(family, outcomes, comfyui_version.__version__)
    log.info("%s: %s", why, [outcome.error for outcome in outcomes])
    assert "HunyuanVideo is not run on several GPUs with ComfyUI 0.3" in why
    assert any(1e-2 < outcome.error < 10 for outcome in outcomes)
