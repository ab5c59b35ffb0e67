"""Accounts and pictures of jobs: who waited for whom, traces, Euler's program, and drift."""

import json

import pytest
import torch
from comfy_xdit_bench.drift import Case, compared, plot
from comfy_xdit_bench.program import euler
from comfy_xdit_bench.trace import spec_named

from comfy_xdit.parallel.spec import ParallelSpec
from comfy_xdit.parallel.traffic import IDLE as WAITED
from comfy_xdit.parallel.traffic import MATCHED, Traffic, account, idle_seconds
from comfy_xdit.timeline.chrome import chrome_trace
from comfy_xdit.timeline.files import write
from comfy_xdit.timeline.job import JobReport, Step
from comfy_xdit.timeline.picture import COMPUTE, IDLE, TALK, timeline
from comfy_xdit.timeline.picture import LINE as LINE_COLOUR
from comfy_xdit.trajectory import Replay

LINE, OTHER = 7.0, 9.0


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def test_who_comes_early_is_idle_until_the_last_is_there():
    early = table((LINE, MATCHED, 1.0, 4.5), (LINE, MATCHED, 6.0, 6.5))
    late = table((LINE, MATCHED, 4.0, 4.5), (LINE, MATCHED, 6.0, 6.5))
    assert [idle_seconds([early, late], place) for place in (0, 1)] == [3.0, 0.0]


def test_other_lines_are_not_waited_for():
    one = table((LINE, MATCHED, 1.0, 2.0))
    other = table((OTHER, MATCHED, 50.0, 51.0))
    assert idle_seconds([one, other], 0) == 0.0


def test_nobody_is_idle_for_longer_than_he_is_inside():
    """A ring's block was sent before the peer came to wait itself."""
    one, peer = table((LINE, MATCHED, 1.0, 1.25)), table((LINE, MATCHED, 9.0, 9.25))
    assert idle_seconds([one, peer], 0) == 0.25


def test_a_neighbours_tensor_is_waited_for_idly():
    assert idle_seconds([table((LINE, WAITED, 2.0, 2.5)), table()], 0) == 0.5


def test_a_rank_alone_reports_itself():
    traffic = Traffic()
    line = traffic.line("ring", (0,))
    with line.timed("send", 12, torch.device("cpu")):
        pass
    with line.timed("send", 0, torch.device("cpu")):
        pass
    report = account(traffic, 0.0, world=None, lines=["ring"], trace=True)
    assert report["bytes_sent"] == {"send": 12}
    assert [(name, axis, num_bytes) for name, axis, _, _, num_bytes in report["events"]] == [
        ("send", "ring", 12),
        ("send", "ring", 0),
    ]
    parts = (report[f"{part}_seconds"] for part in ("compute", "communication", "idle"))
    assert sum(parts) == pytest.approx(report["seconds"]) and report["ranks"][0]["seconds"] == report["seconds"]
    assert "events" not in account(traffic, 0.0, world=None, lines=["ring"], trace=False)


def job():
    """Two ranks, of which the second waits for half a second and then receives."""
    numbers = {"compute_seconds": 1.0, "communication_seconds": 0.5, "idle_seconds": 0.5}
    first = {"began": 10.0, "seconds": 2.0, "events": [["send", "ring", 11.0, 11.5, 8]], **numbers}
    second = {"began": 10.0, "seconds": 2.0, "events": [["p2p", "pipe", 10.0, 11.0, 0]], **numbers}
    step = Step(begin=0.0, end=2.0, reports=(first, second))
    return JobReport(seconds=2.0, steps=(step,), began=10.0)


def test_a_trace_is_one_of_chromes():
    trace = json.loads(json.dumps(chrome_trace({"ring=2": job()})))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["tid"], event["ts"], event["dur"]) for event in complete] == [
        ("step 1", 0, 0.0, 2e6),
        ("send", 0, 1e6, 0.5e6),
        ("step 1", 1, 0.0, 2e6),
        ("p2p", 1, 0.0, 1e6),
    ]
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names == {"ring=2", "rank 0", "rank 1"}


def test_a_whole_run_shows_its_evaluations():
    traffic = Traffic()
    for _ in range(2):
        traffic.begin_evaluation(torch.device("cpu"))
    report = account(traffic, 0.0, world=None, lines=["ring"], trace=True)
    assert report["events"] == [] and report["evaluations"] == sorted(report["evaluations"])
    assert len(report["evaluations"]) == 2 and report["bytes_sent"] == {} and report["idle_seconds"] == 0
    first, second = job().steps[0].reports
    marked = JobReport.of([[{**first, "evaluations": [10.25, 11.5]}, {**second, "evaluations": [11.0, 11.75]}]])
    complete = [event for event in chrome_trace({"": marked})["traceEvents"] if event["ph"] == "X"]
    spans = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in complete if e["name"].startswith("evaluation")]
    assert spans == [
        ("evaluation 1", 0, 0.25e6, 1.25e6),
        ("evaluation 2", 0, 1.5e6, 0.5e6),
        ("evaluation 1", 1, 1e6, 0.75e6),
        ("evaluation 2", 1, 1.75e6, 0.25e6),
    ]
    picture = timeline({"": marked})
    # A line at a quarter of a second of the first rank's two; blue beside it.
    assert [picture.getpixel((150 + x, 48)) for x in (120, 125, 130)] == [COMPUTE, LINE_COLOUR, COMPUTE]


def test_a_job_of_several_messages_goes_by_the_ranks_clock():
    def report(began, seconds):
        return {"began": began, "seconds": seconds, "events": []}

    traced = JobReport.of([[report(5.0, 1.0), report(5.25, 1.5)], [report(7.0, 0.5), report(7.0, 0.25)]])
    assert [(step.begin, step.end) for step in traced.steps] == [(0.0, 1.75), (2.0, 2.5)]
    assert (traced.began, traced.seconds) == (5.0, 2.5)


def test_files_of_a_trace(tmp_path):
    write({"ring=2": job()}, tmp_path / "t.json", tmp_path / "t.png")
    assert json.loads((tmp_path / "t.json").read_text()) == json.loads(json.dumps(chrome_trace({"ring=2": job()})))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def colours(picture, top):
    row = [picture.getpixel((x, top)) for x in range(151, 1149)]
    return {colour: sum(pixel == colour for pixel in row) / len(row) for colour in (COMPUTE, TALK, IDLE)}


def test_a_timeline_draws_collectives_in_their_place():
    picture = timeline({"ring=2": job()})
    first, second = colours(picture, 48), colours(picture, 66)
    assert first[TALK] == pytest.approx(0.25, abs=0.01) and first[COMPUTE] == pytest.approx(0.75, abs=0.01)
    assert second[IDLE] == pytest.approx(0.5, abs=0.01) and second[TALK] == 0


def test_a_timeline_draws_shares_where_it_knows_no_more():
    plain = job()
    for report in plain.steps[0].reports:
        del report["events"]
    assert colours(timeline({"": plain}), 48) == pytest.approx({COMPUTE: 0.5, TALK: 0.25, IDLE: 0.25}, abs=0.01)


@pytest.mark.parametrize("cfg", [None, 3.0])
def test_eulers_program_is_eulers_method(cfg):
    def model(x, level, cond):
        return (0.3 + 0.1 * cond) * x + level

    noise = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x, num_steps = noise.double(), 5
    for step in range(num_steps):
        level = 1 - step / num_steps
        out = model(x, level, 0)
        if cfg is not None:
            uncond = model(x, level, 1)
            out = uncond + cfg * (out - uncond)
        x = x - out / num_steps
    program = euler(num_steps, cfg=cfg)
    replay = Replay(program, noise=noise, latent=0 * noise, noises=[], mask=None)
    for number, call in enumerate(program.calls):
        state = replay.model_input(number)
        outputs = [model(state, call.timestep, cond) for cond in call.conds]
        replay.answer(number, outputs)
        assert [preview.step for preview in replay.previews(number)] == [number + 1]
    assert torch.allclose(replay.output().double(), x, atol=1e-5)


def test_drift_is_of_what_is_seen(tmp_path):
    case = Case(spec=ParallelSpec(pipe=2), num_patches=4, warmup_steps=1)
    exact = torch.zeros(1, 3, 4, 4)
    same = compared(case, exact.clone(), exact)
    assert same.psnr_db == float("inf") and same.max_difference == 0
    white = compared(case, torch.full_like(exact, 5.0), torch.full_like(exact, 1.0))
    assert white.max_difference == 0
    off = compared(case, exact + 2 / 255, exact)
    assert off.max_difference == pytest.approx(1.0, abs=1e-3) and off.psnr_db == pytest.approx(48.13, abs=0.02)
    pytest.importorskip("matplotlib")
    plot([same, off], tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_specs_by_name():
    assert spec_named("cfg=2,ulysses=4") == ParallelSpec(cfg=2, ulysses=4)
    for wrong in ("", "pipe", "pipe=two", "stage=2"):
        with pytest.raises(ValueError, match="is no spec; write degrees as pipe=2"):
            spec_named(wrong)
