"""What is kept of a self-test, for which versions, and how the command tells it; without ComfyUI."""

import dataclasses
import json
import sys

import pytest

from comfy_xdit.cli import main
from comfy_xdit.cli import selftest as command
from comfy_xdit.native import proof
from comfy_xdit.native.families import FAMILIES
from comfy_xdit.native.proof import finding_key, findings, keep, why_refused
from comfy_xdit.native.selftest import Outcome
from comfy_xdit.native.subject import as_text
from comfy_xdit.native.subjects import SUBJECTS

WAN = FAMILIES["wan"]
REAL = {"WAN21_T2V": {**SUBJECTS["wan"][0].config, "dim": 5120, "dtype": object()}}


def refusal(comfyui, results):
    return why_refused(WAN, REAL, str(comfyui), results, lambda: None)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "comfyui" / "comfy").mkdir(parents=True)
    for name in ("ops", "model_detection"):
        (tmp_path / "comfyui" / "comfy" / f"{name}.py").write_text("")
    (tmp_path / "comfyui" / "comfyui_version.py").write_text('__version__ = "1.2.3"\n')
    return tmp_path / "comfyui"


@pytest.fixture
def asked(monkeypatch):
    """Commands that were started; each prints `asked.answer`."""

    class Asked(list):
        answer = json.dumps([{"refused": "no"}])

        def printed(self, command, title, poll):
            self.append(command)
            return self.answer

    asked = Asked()
    monkeypatch.setattr(proof, "_printed", asked.printed)
    return asked


def test_what_is_kept_is_not_asked_again(checkout, tmp_path, asked):
    results = tmp_path / "selftest.json"
    assert refusal(checkout, results) == "no"
    told = ["--family", "wan", "--kind", "WAN21_T2V", "--config", as_text(REAL["WAN21_T2V"]), "--json"]
    assert asked[0][-10:] == ["selftest", "--comfyui", str(checkout), *told]
    keep(results, finding_key(WAN, str(checkout), REAL), "")
    assert refusal(checkout, results) == "" and len(asked) == 1
    (checkout / "comfy" / "ops.py").write_text("# changed")
    assert refusal(checkout, results) == "no" and len(asked) == 2


def test_a_finding_is_for_one_plan(checkout):
    other = dataclasses.replace(WAN, plan=FAMILIES["wan-vace"].plan)
    assert finding_key(WAN, str(checkout)) != finding_key(other, str(checkout))
    assert finding_key(WAN, str(checkout)) == finding_key(WAN, str(checkout))


def test_a_finding_is_for_one_configuration_of_any_size(checkout):
    def key(**more):
        return finding_key(WAN, str(checkout), {"WAN21_T2V": {**REAL["WAN21_T2V"], **more}})

    assert key() == key(dim=1536) == key(dtype=1)
    assert len({key(), key(qk_norm=False), key(of_the_file=True), finding_key(WAN, str(checkout))}) == 4


def test_a_configuration_that_no_text_says_is_named():
    with pytest.raises(ValueError, match="'act' is a builtin_function_or_method"):
        as_text({"act": print})


@pytest.mark.parametrize("answer", ["", "[]", "not JSON", '[{"refused": ""}, {"refused": ""}]'])
def test_a_selftest_that_could_not_run_refuses_and_is_not_kept(answer, checkout, tmp_path, asked):
    asked.answer = answer
    assert "its self-test could not be run" in refusal(checkout, tmp_path / "selftest.json")
    assert not (tmp_path / "selftest.json").exists()


@pytest.fixture
def started(monkeypatch):
    """Processes that were started instead of a self-test; they never end by themselves."""
    started = []

    def start(command, **how):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **how))
        return started[-1]

    popen = proof.subprocess.Popen
    monkeypatch.setattr(proof.subprocess, "Popen", start)
    return started


def test_a_selftest_without_end_refuses(checkout, tmp_path, monkeypatch, started):
    monkeypatch.setattr(proof, "TIMEOUT_S", 0.0)
    assert "could not be run (TimeoutExpired)" in refusal(checkout, tmp_path / "selftest.json")
    assert started[0].returncode is not None


def test_a_selftest_ends_with_its_run(checkout, tmp_path, monkeypatch, started, caplog):
    class Interrupted(Exception):
        pass

    def poll():
        if any("runs for" in record.getMessage() for record in caplog.records):
            raise Interrupted

    monkeypatch.setattr(proof, "TELL_S", 0.0)
    with caplog.at_level("INFO", "comfy_xdit"), pytest.raises(Interrupted):
        why_refused(WAN, REAL, str(checkout), tmp_path / "selftest.json", poll)
    assert started[0].returncode is not None and not (tmp_path / "selftest.json").exists()


def test_what_is_printed_is_the_answer():
    assert proof._printed([sys.executable, "-c", "print('a' * 100000)"], "Toy", lambda: None) == "a" * 100000 + "\n"


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_broken_file_of_findings_is_none(text, tmp_path):
    results = tmp_path / "selftest.json"
    results.write_text(text)
    assert findings(results) == {}
    keep(results, "a", "why")
    keep(results, "b", "")
    assert findings(results) == {"a": "why", "b": ""}
    assert [path.name for path in tmp_path.iterdir()] == ["selftest.json"]


def test_what_can_not_be_kept_is_no_error(tmp_path):
    keep(tmp_path / "none" / "selftest.json", "a", "")


@pytest.fixture
def outcomes(monkeypatch, tmp_path):
    """Family → what its self-test finds."""
    found = {}
    monkeypatch.setenv("COMFY_XDIT_HOME", str(tmp_path / "pools"))
    monkeypatch.setattr(command, "boot", lambda wanted, device: None)
    monkeypatch.setattr(command, "selftest", lambda family, subjects, real: found.get(family.name, []))
    return found


def test_the_command_tells_and_keeps(checkout, tmp_path, outcomes, capsys):
    outcomes["wan"] = [Outcome(call="video on ring=3", error=2e-7)]
    assert main(["selftest", "--comfyui", str(checkout)]) == 0
    assert capsys.readouterr().out == "wan                holds: 1 calls, worst difference 2.0e-07\n"
    kept = findings(tmp_path / "pools" / "selftest.json")
    assert kept[finding_key(WAN, str(checkout))] == ""
    assert "ComfyUI 1.2.3 has no Krea 2" in kept[finding_key(FAMILIES["krea2"], str(checkout))]


def test_the_command_refuses(checkout, tmp_path, outcomes, capsys):
    outcomes["wan"] = [Outcome(call="video on ring=3", error=0.3), Outcome(call="a", error=float("inf"), why="broken")]
    assert main(["selftest", "--comfyui", str(checkout), "--family", "wan"]) == 1
    shown = capsys.readouterr().out
    assert "refused: Wan is not run on several GPUs with ComfyUI 1.2.3" in shown and "    a: broken\n" in shown
    assert main(["selftest", "--comfyui", str(checkout), "--family", "wan", "--json"]) == 1
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["worst"] is None and entry["failed"] == ["video on ring=3: 0.3", "a: broken"]
    assert findings(tmp_path / "pools" / "selftest.json")[finding_key(WAN, str(checkout))] == entry["refused"]
    assert main(["selftest", "--comfyui", str(checkout), "--family", "krea2"]) == 1


def test_the_command_takes_a_files_configuration(checkout, tmp_path, outcomes):
    outcomes["wan"] = [Outcome(call="video on ring=3", error=2e-7)]
    words = ["selftest", "--comfyui", str(checkout), "--family", "wan", "--kind", "WAN21_T2V"]
    assert main([*words, "--config", as_text(REAL["WAN21_T2V"])]) == 0
    assert findings(tmp_path / "pools" / "selftest.json") == {finding_key(WAN, str(checkout), REAL): ""}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--family", "wan", "--kind", "Flux", "--config", "{}"], "--config needs --kind"),
        (["--config", "{}"], "--config needs --kind"),
        (["--family", "wan", "--kind", "WAN21_T2V", "--config", "[]"], "no dict of plain values"),
    ],
)
def test_half_a_configuration_is_refused(more, sentence, checkout, outcomes, capsys):
    assert main(["selftest", "--comfyui", str(checkout), *more]) == 1
    assert sentence in capsys.readouterr().err


def test_a_folder_without_comfyui_is_named(tmp_path, capsys):
    assert main(["selftest", "--comfyui", str(tmp_path)]) == 1
    assert "without a ComfyUI in it" in capsys.readouterr().err
