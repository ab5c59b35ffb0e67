"""install.py: what it says without arguments, and what it would install; nothing is downloaded here."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_xdit.cli import COMMANDS
from comfy_xdit.mount import IN_CHECKOUT

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def install(monkeypatch, tmp_path):
    """The module, with a folder of the test's own in place of the checkout."""
    spec = importlib.util.spec_from_file_location("install_under_test", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.fixture
def commands(install, monkeypatch):
    """Every command that would have been run, in place of running it; those in `fails` fail."""
    recorded, fails = [], []

    def run(command, **options):
        recorded.append(command)
        failed = any(word in command for word in fails) and "--extra-index-url" not in command
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return subprocess.CompletedProcess(command, int(failed), "", "ERROR: No matching distribution" * failed)

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.subprocess, "call", lambda command, cwd: recorded.append(command) or 7)
    recorded_and_fails = (recorded, fails)
    return recorded_and_fails


def test_without_arguments_it_only_looks(tmp_path):
    """In a Python without any of our requirements, and with no pip to be called."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "install.py")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "torch is not installed here" in done.stdout
    assert "Missing: diffusers, distvae" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_is_a_sentence(install, monkeypatch, capsys):
    def broken():
        raise OSError("driver gone")

    broken.__name__ = "look_at_torch"
    monkeypatch.setattr(install, "look_at_torch", broken)
    assert install.main([]) == 0
    assert "torch could not be checked: driver gone." in capsys.readouterr().out


def test_nothing_but_the_standard_library():
    tree = ast.parse((ROOT / "install.py").read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in top} <= sys.stdlib_module_names


def test_requirements_are_those_of_pyproject_without_torch():
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == declared
    assert not any(line.startswith("torch") for line in declared)


def test_every_package_is_installed_under_the_name_that_a_checkout_gives_it():
    tomllib = pytest.importorskip("tomllib")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: name for name in IN_CHECKOUT} | setup["package-dir"]
    assert folders == IN_CHECKOUT
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in IN_CHECKOUT.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(found) == setup["packages"]


def test_commands_are_found_in_an_installed_copy(tmp_path):
    """Where each package lies in a folder of its import name, and there is no checkout."""
    for name, folder in IN_CHECKOUT.items():
        shutil.copytree(ROOT / folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    program = (
        "import importlib, sys\n"
        "from comfy_xdit import cli\n"
        "assert cli.main(['--version']) == 0\n"
        "for module, _ in cli.COMMANDS.values(): print(importlib.import_module(module).__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = done.stdout.splitlines()[1:]
    assert len(files) == len(COMMANDS) and all(Path(file).is_relative_to(tmp_path) for file in files)


def test_the_demo_gets_the_cpu_build_without_a_gpu(install, commands, monkeypatch):
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install.sys, "platform", "linux")
    recorded, _ = commands
    assert install.main(["--demo", "--steps", "2"]) == 7
    torch = [command for command in recorded if any("torch" in word for word in command)]
    assert [command[-1] for command in torch] == [f"torch=={install.TORCH}+cpu"]
    assert recorded[-1][1:] == ["-m", "comfy_xdit", "demo", "--steps", "2"]


def test_the_general_build_is_taken_where_pip_finds_no_cpu_build(install, commands, monkeypatch, capsys):
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install.sys, "platform", "linux")
    recorded, fails = commands
    fails.append(f"torch=={install.TORCH}+cpu")
    assert install.main(["--test"]) == 7
    assert any(command[-1] == f"torch=={install.TORCH}" for command in recorded)
    assert [command[-1] for command in recorded if "-e" in command] == [".[test]"]
    # What pip said, and no cause that we would make up: a network that is down fails the same way.
    said = f"pip could not install torch {install.TORCH} for CPUs: No matching distribution; trying the general build"
    assert said in capsys.readouterr().out


def test_with_a_gpu_torch_is_the_general_build(install, commands, monkeypatch):
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    recorded, _ = commands
    install.main(["--demo"])
    assert any(command[-1] == f"torch=={install.TORCH}" for command in recorded)


def test_pips_reason_is_told(install, commands, capsys):
    recorded, fails = commands
    fails.append("-e")
    assert install.main(["--test"]) == 1
    assert "pip could not install the package and what it needs: No matching" in capsys.readouterr().out
    assert "pytest" not in recorded[-1]


def test_an_environment_is_made_once_and_again_when_requirements_change(install, commands):
    recorded, _ = commands
    install.main(["--test"])
    first = len(recorded)
    install.main(["--test"])
    assert len(recorded) == first + 1, "only pytest runs the second time"
    with open(install.ROOT / "pyproject.toml", "a") as project:
        project.write("# changed\n")
    install.main(["--test"])
    assert len(recorded) == 2 * first + 1


def test_an_old_python_is_refused_in_a_sentence(install, monkeypatch, capsys):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1))
    assert install.main(["--demo"]) == 1
    assert "is too old; use 3.10 or newer" in capsys.readouterr().out


def test_the_pinned_torch_is_that_of_the_test_extra(install):
    assert f'"torch=={install.TORCH}"' in (ROOT / "pyproject.toml").read_text()
