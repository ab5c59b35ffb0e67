"""A flash-attn that does not work costs a line in the log: neither a worker nor a wrong number."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comfy_xdit.parallel import flash, flash_try, kernels

GOOD = """
import torch
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return (out, scores.logsumexp(-1), None) if return_attn_probs else out
"""

FAULTS = {
    "crashes": ("import os\ndef flash_attn_func(*a, **k):\n    os.kill(os.getpid(), 11)\n", "signal 11"),
    "exits": ("raise SystemExit(3)\n", "status 3"),
    "exits as if all were well": ("import os\nos._exit(0)\n", "it said nothing"),
    "raises": (
        "def flash_attn_func(q, k, v, softmax_scale=None):\n"
        "    raise RuntimeError('CUDA error: no kernel image is available')\n",
        "RuntimeError: CUDA error: no kernel image is available",
    ),
    "raises at import": ("raise OSError('libcudart.so.11.0: cannot open')\n", "OSError: libcudart.so.11.0"),
    "lacks the argument": ("def flash_attn_func(q, k, v):\n    return q, q\n", "TypeError"),
    "gives no log-sum-exp": (GOOD.replace("return (out", "return out if 1 else (out"), "its output is of shape"),
    "is wrong": (GOOD.replace(".softmax(-1)", ".softmax(-1) * 1.05"), "its output is"),
    "has another base": (GOOD.replace("scores.logsumexp(-1)", "scores.logsumexp(-1) / 0.6931"), "its log-sum-exp is"),
    "gives nan": (GOOD.replace("scores.softmax(-1)", "scores.softmax(-1) * float('nan')"), "its output is nan off"),
    "hangs": ("import time\ndef flash_attn_func(*a, **k):\n    time.sleep(600)\n", "no answer in"),
}


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Makes a package of a name and a text; what was found out before is forgotten."""

    def make(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    monkeypatch.syspath_prepend(str(tmp_path))
    for asked in (flash.usable, flash.is_installed):
        asked.cache_clear()
    yield make
    for asked in (flash.usable, flash.is_installed):
        asked.cache_clear()
    for name in flash.MODULES.values():
        sys.modules.pop(name, None)


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", flash.MODULES)
def test_a_package_that_works_is_used(package, name, caplog) -> None:
    package(flash.MODULES[name], GOOD)
    dtype = torch.float16 if name == "flash-attn 3" else torch.bfloat16
    kernel = flash.usable(name, CPU, dtype)
    assert kernel is not None
    q, k, v = (torch.randn(1, 2, tokens, 8).to(dtype) for tokens in (5, 7, 7))
    out, lse = flash_try.attend(kernel, q, k, v, 0.3)
    want, want_lse = kernels._math(q, k, v, None, 0.3)
    assert (out.float() - want.float()).abs().max() < 0.02 and (lse - want_lse).abs().max() < 0.02
    assert not caplog.records


@pytest.mark.parametrize("fault", FAULTS)
def test_a_package_that_does_not_work_costs_a_line_in_the_log(package, fault, caplog, monkeypatch) -> None:
    text, sentence = FAULTS[fault]
    name = list(flash.MODULES)[list(FAULTS).index(fault) % 2]
    package(flash.MODULES[name], text)
    if fault == "hangs":
        monkeypatch.setattr(flash, "TRY_TIMEOUT_S", 8.0)
    with caplog.at_level(logging.WARNING):
        assert [flash.usable(name, CPU, torch.bfloat16) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert sentence in record.getMessage() and name in record.getMessage()
    assert flash.MODULES[name] not in sys.modules


def test_the_other_one_is_tried_when_one_does_not_work(package, monkeypatch) -> None:
    package("flash_attn_interface", FAULTS["crashes"][0])
    package("flash_attn", GOOD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    fault = flash._fault
    monkeypatch.setattr(flash, "_fault", lambda module, device, dtype: fault(module, "cpu", dtype))
    with torch.device("meta"):
        q = torch.empty(1, 2, 3, 64, dtype=torch.float16)
    q = type("Query", (), {"device": torch.device("cuda"), "dtype": q.dtype, "shape": q.shape})()
    assert kernels.choose(q, masked=False, lse=True) == "flash-attn 2"


BROKEN = ("yunchang", "sageattention", "flashinfer", "aiter", "xformers", "flash_attn", "flash_attn_interface")


@pytest.mark.parametrize("how", ["raise RuntimeError('broken')", "raise OSError('broken')", "raise SystemExit(1)"])
def test_broken_optional_packages_do_not_touch_a_ring(tmp_path, how) -> None:
    """They are on the path of ring ranks and would fail, or end the process, if anybody imported them."""
    for name in BROKEN:
        (tmp_path / f"{name}.py").write_text(how + "\n")
    code = (
        "import sys, torch\n"
        "from ranks import Ranks\n"
        "from test_parallel_attention import random_qkv, plain\n"
        "q, k, v = random_qkv(0, 1, 4, 12, 8, torch.float64)\n"
        "with Ranks(2) as ranks:\n"
        "    outs = ranks.run('run_attention', q=q, k=k, v=v, lengths=(4, 8), mask=None, degrees={'ring': 2})\n"
        "assert all((out - plain(q, k, v)[0]).abs().max() < 1e-12 for out in outs)\n"
        f"assert not set(sys.modules) & set({BROKEN!r})\n"
        "print('right')\n"
    )
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(here)]), "OMP_NUM_THREADS": "1"}
    prefix = f"import runpy; runpy.run_path({str(here / 'conftest.py')!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", prefix + code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip().endswith("right"), done.stderr
