"""No sentence that quotes a log or an exception names a path of the machine, whatever the text is."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import torch
from comfy_xdit_worker import trial
from comfy_xdit_worker.coordinator_client import CoordinatorClient
from comfy_xdit_worker.failures import classify
from harness import private_home
from hypothesis import given
from hypothesis import strategies as st

from comfy_xdit.errors import InputError
from comfy_xdit.pool import start
from comfy_xdit.pool.client import PoolError
from comfy_xdit.pool.folder import pool_folder
from comfy_xdit.pool.starts import MAX_FAILED_STARTS, Starts
from comfy_xdit.pool.trial import SEND_RECEIVE
from comfy_xdit.quoted import quoted

SECRET = "jane-doe"
"""A folder of each path below: who has it in a sentence has told who they are."""

TEXTS = [
    f"[Errno 2] No such file or directory: '/home/{SECRET}/my models/flux.safetensors'",
    f"/home/{SECRET}/lib/libnccl.so.2: undefined symbol: ncclCommInit",
    f'File "/home/{SECRET}/venv/torch/nn.py", line 5, in forward',
    f"can't open file://home/{SECRET}/x.bin (~{SECRET}/x.bin, //net/{SECRET}/x.bin)",
    f"PYTHONPATH=/srv/{SECRET}/a:/srv/{SECRET}/b has no module\nin /srv/{SECRET}/c",
    f"b'/home/{SECRET}/x' [/home/{SECRET}/y] {{/home/{SECRET}/z}}",
]

RESTS = ("flux.safetensors", "libnccl.so.2: undefined", "line 5", "x.bin, x.bin", "in c", "[y]")

names = st.text(st.characters(whitelist_categories=["L", "N"], whitelist_characters="-_.+@="), min_size=1, max_size=8)
names = names.filter(lambda name: name.strip("."))
words = st.sampled_from(["no", "file:", "(errno", "2)", "path=", "'x'", "and", "3.5", "[", "]", ","])


@given(data=st.data())
def test_of_a_path_the_last_name_is_left_whatever_stands_around_it(data):
    before, after = (" ".join(data.draw(st.lists(words, max_size=3))) for _ in range(2))
    folders, last = data.draw(st.lists(names, min_size=1, max_size=4)), data.draw(names)
    path = "/" + "/".join([*folders, last])
    around = data.draw(st.sampled_from(["{}", "'{}'", '"{}"', "({})", "[{}]", "at:{}", "of={}", "<{}>", "{}\n"]))
    told = quoted(f"{before} {around.format(path)} {after}")
    assert "/" not in told and last in told
    assert told == " ".join(f"{before} {around.format(last)} {after}".split())


@given(data=st.data())
def test_between_quotes_a_path_may_have_spaces(data):
    folders = data.draw(st.lists(st.lists(names, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=3))
    assert quoted(f"no file '/{'/'.join(folders)}/a b.bin'") == "no file 'a b.bin'"


@pytest.mark.parametrize(
    "text",
    [
        "see https://pytorch.org/docs/stable/nn.html and docs/troubleshooting.md#x",
        "3/4 of it, and/or a / b, ../x ./y blocks/0 (NCCL 2.20/CUDA 12)",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    ],
)
def test_what_is_no_path_of_the_machine_stays(text):
    assert quoted(text) == text


# The places


class Wire:
    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def of_a_failed_job(text):
    return [classify(kind(text), 0)[1] for kind in (KeyError, RuntimeError, OSError, MemoryError, InputError)]


def of_a_worker_that_cannot_start(text):
    wire = Wire()
    CoordinatorClient(wire).failed(RuntimeError(text))
    starts, (said,) = Starts(), wire.sent
    starts.last_error = said["message"]
    for _ in range(MAX_FAILED_STARTS):
        starts.failed("it ended")
    return [starts.hopeless("test"), said["message"]]


def of_a_first_exchange(text):
    told = []

    def fails():
        raise RuntimeError(text)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(trial, "_steps", lambda *_: [(SEND_RECEIVE, [1, 1], fails)])
        trial._try(None, torch.device("cpu"), 0, 2, lambda kind, **fields: told.append((kind, fields)))
    return [fields["raised"] for kind, fields in told if kind == "trial_failed"]


def of_a_supervisor(text, how):
    """One that says `text` and ends: to who started it, or in its log."""
    with private_home() as home, pytest.MonkeyPatch.context() as patch:
        program = home / "python"
        to = "os.fdopen(int(sys.argv[sys.argv.index('--ready-fd') + 1]), 'w')" if how == "told" else "sys.stderr"
        # The log's last line alone is quoted.
        said = text if how == "told" else " ".join(text.split())
        program.write_text(f"#!{sys.executable}\nimport os, sys\n{to}.write({said!r})\nsys.exit(1)\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        patch.setattr(sys, "executable", str(program))
        folder = pool_folder("test")
        with pytest.raises(PoolError) as found:
            start.spawn(folder, ["cpu"])
    return [str(found.value)]


PLACES = {
    "a failed job": of_a_failed_job,
    "a worker that cannot start": of_a_worker_that_cannot_start,
    "the ranks' first exchange": of_a_first_exchange,
    "a supervisor's last word": lambda text: of_a_supervisor(text, "told"),
    "a supervisor's log": lambda text: of_a_supervisor(text, "logged"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", TEXTS)
def test_no_sentence_names_a_folder_of_the_machine(place, text):
    sentences = PLACES[place](text)
    assert sentences
    for sentence in sentences:
        assert SECRET not in sentence and "\n" not in sentence
        assert any(rest in sentence for rest in RESTS)
