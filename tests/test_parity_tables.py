"""The tables of docs/parity.md: which modes they have, what is measured for them, and how they are written."""

import math
import sys

import pytest
import torch
from comfy_xdit_bench import parity
from comfy_xdit_bench.matrix import against_one_rank, psnr_db
from comfy_xdit_bench.modes import is_exact, modes, title
from comfy_xdit_bench.parity_tables import drift_table, mode_table, sampler_table

from comfy_xdit import cli
from comfy_xdit.parallel.spec import AXES, check


def test_modes_have_every_method_alone_and_products_with_every_other():
    found = {number: modes(number) for number in parity.NUM_RANKS}
    for number, specs in found.items():
        assert all(spec.num_ranks == number and not check(spec, num_ranks=number) for spec in specs)
        assert len(specs) == len({str(spec) for spec in specs})
    assert {title(spec) for spec in found[2]} == {f"{axis}=2" for axis in AXES}
    pairs = {frozenset(axis for axis, degree in spec.degrees.items() if degree == 2) for spec in found[4]}
    wanted = {frozenset((a, b)) for a in AXES for b in AXES if a < b} - {frozenset(("pipe", "distri"))}
    assert wanted <= pairs
    hybrids = [spec for specs in found.values() for spec in specs if sum(d > 1 for d in spec.degrees.values()) > 1]
    assert len(hybrids) >= 12
    with pytest.raises(ValueError, match="5 ranks"):
        modes(5)


def test_two_ranks_against_one(capsys):
    results = list(against_one_rank(2))
    near = {title(spec): not is_exact(spec) for spec in modes(2)}
    assert {(result["kind"], result["mode"]) for result in results} == {
        (kind, mode) for kind in ("flux", "sd3", "pixart") for mode in near
    }
    with capsys.disabled():
        sys.stdout.write("\n" + mode_table({"1 rank": results}) + drift_table(results))
    assert max(result["error"] for result in results) <= parity.ONE_RANK_LIMIT
    for result in results:
        assert (result["drift"] is not None) == near[result["mode"]] == (result["psnr_db"] is not None)
        if near[result["mode"]]:
            assert parity.ONE_RANK_LIMIT < result["drift"] < 0.5 and result["psnr_db"] > 20


def one(kind, mode, error, **more):
    return {"kind": kind, "mode": mode, "ranks": 2, "error": error, "drift": None, "psnr_db": None, **more}


def test_tables():
    results = [one("a", "cfg=2", 1e-7), one("b", "cfg=2", 0.0), one("a", "pipe=2", 3e-6, drift=0.25, psnr_db=31.26)]
    host = [{"kind": "a", "case": "cfg=2", "error": error} for error in (2e-6, 4e-5)]
    assert mode_table({"1 rank": results, "ComfyUI 1": host}).splitlines() == [
        "| ranks | mode | a, 1 rank | a, ComfyUI 1 | b, 1 rank | b, ComfyUI 1 |",
        "|---|---|---|---|---|---|",
        "| 2 | cfg=2 | 1e-07 | 4e-05 | 0 | - |",
        "| 2 | pipe=2 | 3e-06 | - | - | - |",
        "|  | **worst** | 3e-06 | 4e-05 | 0 | - |",
    ]
    assert drift_table(results).splitlines()[2:] == ["| 2 | pipe=2 | 2e-01, 31.3 dB | - |"]
    samplers = [
        {"kind": "a", "case": "1 rank", "sampler": name, "scheduler": "normal", "error": error}
        for name, error in (("euler", 1e-7), ("heun", 2e-7))
    ]
    assert sampler_table(samplers).splitlines()[-2:] == ["| heun | normal | 2e-07 |", "| **worst** |  | 2e-07 |"]


def test_psnr():
    exact = torch.tensor([0.0, 10.0])
    assert psnr_db(exact + 1, exact) == pytest.approx(20) and math.isinf(psnr_db(exact, exact))


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_the_command_fails_beyond_a_limit(error, monkeypatch, capsys):
    found = [one("a", "cfg=2", 1e-7), one("a", "ring=2", error)]
    monkeypatch.setattr(parity, "against_one_rank", lambda number: found)
    assert cli.main(["parity", "--ranks", "2"]) == 1
    out = capsys.readouterr().out
    assert "| 2 | cfg=2 | 1e-07 |" in out and f"|  | **worst** | {error:.0e} |" in out
    found.pop()
    assert cli.main(["parity", "--ranks", "2"]) == 0
