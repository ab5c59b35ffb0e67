"""Recorded samplers: eager freeing and slices give what the sampler itself gives, bit for bit."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_xdit import messages
from comfy_xdit.sampler_recorder import SAMPLE, NotAProgram, SamplerRecorder
from comfy_xdit.trajectory import Constant, Operation, Replay, SamplerProgram

FEW = settings(max_examples=25, deadline=None)


class Multistep:
    """A made-up sampler: x' = a·x + b·x_before + Σ c_k·d_{i-k} + u·uncond + s·noise, with random coefficients.

    order: answers read by a step. states: inputs read by a step (1 or 2). masked: as the host inpaints.
    """

    def __init__(self, seed, *, steps, order, states, pure, noisy, masked=False):
        random = np.random.default_rng(seed)
        self.steps, self.order, self.states, self.pure, self.noisy = steps, order, states, pure, noisy
        self.masked = masked
        self.a = random.uniform(0.3, 0.9, steps).tolist()
        self.b = random.uniform(-0.5, 0.5, steps).tolist()
        # Tensors, as a host's sigmas are, of no dim and of as many as the latent's.
        self.c = torch.from_numpy(random.uniform(0.1, 0.9, (steps, order))).float()
        self.u = torch.from_numpy(random.uniform(0.1, 0.5, (steps, 1, 1, 1, 1))).float()
        self.s = random.uniform(0.1, 0.5, steps).tolist()
        self.scale = random.uniform(0.5, 3.0, (steps, 3)).tolist()

    def run(self, value, model, show=lambda i, denoised: None):
        """value(name) and model(i, x) → both outputs; the same code for numbers and for a recorder."""
        noise, latent = value("noise"), value("latent")
        mask = value("mask") if self.masked else None
        x = 2.0 * noise + 0.5 * latent
        before, answers = x, []
        for i in range(self.steps):
            scale, skip, gain = self.scale[i]
            if self.masked:
                x = x * mask + (noise * self.s[i] + latent) * (1.0 - mask)
            both = [x * skip + output * gain for output in model(i, x * scale)]
            denoised = both[1] + (both[0] - both[1]) * 3.0
            if self.masked:
                denoised = denoised * mask + latent * (1.0 - mask)
            show(i, denoised)
            answers.insert(0, denoised)
            after = self.a[i] * x
            for c, d in zip(self.c[i], answers, strict=False):
                after = after + c * d
            if self.states == 2:
                after += self.b[i] * before
            if self.pure:
                after = torch.add(after, both[1] * self.u[i], alpha=-0.5)
            if self.noisy:
                after = after + self.s[i] * value(f"n{i}")
            before, x = x, after
        return x

    def program(self):
        recorder = SamplerRecorder()

        def model(i, x):
            return recorder.call(x, sigma=1.0 - i / self.steps, timestep=1000.0 - i, conds=[0, 1])

        output = self.run(recorder.value, model, lambda i, denoised: recorder.preview(i, self.steps, denoised))
        return recorder.program(["positive", "negative"], output)


@st.composite
def samplers(draw):
    return Multistep(
        draw(st.integers(0, 10_000)),
        steps=draw(st.integers(1, 14)),
        order=draw(st.integers(1, 4)),
        states=draw(st.integers(1, 2)),
        pure=draw(st.booleans()),
        noisy=draw(st.booleans()),
        masked=draw(st.booleans()),
    )


def network(x, k):
    """Nonlinear and elementwise, of operations that round alike everywhere in a tensor."""
    return x / (1.0 + x.abs()) * 0.7 + 0.1 * (k + 1)


def tensors(program, shape=(2, 4, 6, 5)):
    """noise, latent and mask by name, and the noises by index."""
    generator = torch.Generator().manual_seed(3)
    names = ("noise", "latent", *range(len(program.calls)))
    noises = {name: torch.randn(shape, generator=generator) for name in names}
    mask = torch.rand(shape, generator=generator)
    return {"noise": noises.pop("noise"), "latent": noises.pop("latent"), "mask": mask}, noises


def replay(program, begin, noises, **options):
    """Output, previews, and the most tensors held while the network ran."""
    run = Replay(program, **begin, noises=noises, **options)
    shown, peak = [], 0
    for i, call in enumerate(program.calls):
        x = run.model_input(i)
        peak = max(peak, run.num_held)
        run.answer(i, [network(x, k) for k in call.conds])
        shown += [progress.denoised for progress in run.previews(i)]
    return run.output(), shown, peak


@FEW
@given(samplers())
def test_replay_equals_the_sampler_bit_for_bit(sampler):
    program = sampler.program()
    begin, noises = tensors(program)
    values = begin | {f"n{j}": tensor for j, tensor in noises.items()}
    seen = []
    expected = sampler.run(
        values.__getitem__, lambda i, x: [network(x, k) for k in (0, 1)], lambda i, denoised: seen.append(denoised)
    )
    output, shown, _ = replay(program, begin, noises)
    assert torch.equal(output, expected)
    assert len(shown) == sampler.steps
    assert all(torch.equal(a, b) for a, b in zip(shown, seen, strict=True))


@FEW
@given(samplers())
def test_only_what_is_read_again_is_held(sampler):
    program = sampler.program()
    begin, noises = tensors(program)
    eager, shown, peak = replay(program, begin, noises)
    full, shown_full, everything = replay(program, begin, noises, keep=True)
    assert torch.equal(eager, full)
    assert all(torch.equal(a, b) for a, b in zip(shown, shown_full, strict=True))
    assert peak == program.peak_held() <= everything
    # The network's input, the states that a step reads, and the answers but the newest.
    assert peak <= 1 + sampler.states + (sampler.order - 1)
    assert program.noises() == (list(range(sampler.steps)) if sampler.noisy else [])


@FEW
@given(samplers(), st.data())
def test_a_slice_replays_as_the_whole_bit_for_bit(sampler, data):
    program = sampler.program()
    begin, noises = tensors(program)
    whole, shown, _ = replay(program, begin, noises)
    rows = sorted(data.draw(st.sets(st.integers(1, 5), max_size=3)) | {0, 6})
    for top, end in itertools.pairwise(rows):
        part, part_shown, _ = replay(
            program,
            {name: tensor[:, :, top:end] for name, tensor in begin.items()},
            lambda j, top=top, end=end: noises[j][:, :, top:end],
        )
        assert torch.equal(part, whole[:, :, top:end])
        pairs = zip(part_shown, shown, strict=True)
        assert all(torch.equal(a, b[:, :, top:end]) for a, b in pairs)


def test_mask_keeps_the_known_latent():
    sampler = Multistep(5, steps=4, order=2, states=1, pure=False, noisy=True, masked=True)
    program = sampler.program()
    begin, noises = tensors(program)
    run = Replay(program, **begin | {"mask": torch.zeros_like(begin["noise"])}, noises=noises)
    for i in range(4):
        run.answer(i, [torch.full_like(begin["noise"], 7.0)] * 2)
        assert torch.equal(run.previews(i)[0].denoised, begin["latent"])
    with pytest.raises(AssertionError, match="without a mask"):
        Replay(program, noise=begin["noise"], latent=begin["latent"])


@FEW
@given(samplers())
def test_travels_as_json(sampler):
    program = sampler.program()
    text, carried = messages.encode(program)
    assert carried == [] and json.loads(text)
    assert messages.decode(text, []) == program


def test_what_nobody_reads_is_not_recorded():
    recorder = SamplerRecorder()
    x = recorder.value("noise")
    (output,) = recorder.call(x, sigma=1.0, timestep=1.0, conds=[0])
    unread = (x - output) * recorder.value("n0")
    x.mul_(0.5)
    assert unread is not x
    program = recorder.program(["positive"], x + output)
    assert [operation.function for operation in program.after] == ["mul", "add"]
    assert program.noises() == []


def on_tape(change):
    """What `change(x, d)` makes of random numbers by itself, and replayed."""
    generator = torch.Generator().manual_seed(1)
    noise, output = torch.randn((2, 2, 4, 3, 5), generator=generator)
    recorder = SamplerRecorder(noise)
    (traced,) = recorder.call(recorder.value("noise", noise), sigma=1.0, timestep=1.0, conds=[0])
    result = change(recorder.value("noise", noise), traced)
    program = recorder.program(["positive"], result)
    run = Replay(program, noise=noise, latent=0 * noise)
    run.answer(0, [output])
    return run.output(), change(noise.clone(), output.clone()), program


EXACT = {
    "numbers": lambda x, d: (2 * x + 1) / 3 - d * 0.3 + 1.0 / 7,
    "number first": lambda x, d: 1.0 - (2.5 / (d + 10) - x),
    "no dim": lambda x, d: x + (x - d) / torch.tensor(0.003) * torch.tensor(-0.2, dtype=torch.float64),
    "all dims": lambda x, d: x * torch.full((2, 1, 1, 1), 0.7) - d,
    "whole numbers": lambda x, d: x * torch.tensor(3) + d,
    "in place": lambda x, d: x.mul_(0.5).add_(d).sub_(0.1).div_(torch.tensor(3.0)),
    "a view shares": lambda x, d: (x.view(x.shape).mul_(2.0), x + d)[1],
    "a copy does not": lambda x, d: (x.clone().mul_(2.0), x + d)[1],
    "copied into": lambda x, d: (x.copy_(d), x + 1.0)[1],
    "negative": lambda x, d: -x + d.neg(),
    "limits": lambda x, d: (x * d).clamp(-0.5, 0.5).clamp(min=-0.1) + x.clamp(max=0.2),
    "wider": lambda x, d: (x.double() * 0.1 + d).to(torch.float32) * torch.ones(1, 1, 1, 1, dtype=torch.float64),
    "of its shape": lambda x, d: x * torch.zeros_like(d) + torch.full_like(x, 0.3) * d,
}
CLOSE = {
    "lerp": lambda x, d: torch.lerp(x, d, 0.3) + torch.lerp(x, d, torch.tensor(0.7)),
    "alpha": lambda x, d: torch.add(x, d, alpha=0.3) - torch.sub(d, x, alpha=0.7),
    "addcmul": lambda x, d: torch.addcmul(x, x, d, value=0.3) + torch.addcdiv(d, x, torch.tensor(3.0), value=2.0),
    "tensordot": lambda x, d: torch.tensordot(
        torch.stack([x, d, x + d], dim=1), torch.tensor([0.2, 0.7, -0.4]), dims=([1], [0])
    ),
    "einsum": lambda x, d: torch.einsum("k,bkchw->bchw", torch.tensor([0.2, 0.7]), torch.stack([x, d], dim=1)),
}
"""Fused in torch; recorded an operation at a time, they may differ by a rounding."""


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_operations_are_replayed_bit_for_bit(name, inference):
    with torch.inference_mode(inference):
        ours, expected, _ = on_tape(EXACT[name])
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CLOSE)
def test_fused_operations_are_replayed(name, inference):
    with torch.inference_mode(inference):
        ours, expected, _ = on_tape(CLOSE[name])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=5e-7)


def test_constants_keep_what_decides_on_dtypes():
    _, _, program = on_tape(EXACT["no dim"])
    constants = [operand for op in program.after for operand in op.operands if isinstance(operand, Constant)]
    assert [(c.dtype, c.num_dims) for c in constants] == [("float32", 0), ("float64", 0)]


REFUSED = {
    "mean": (lambda x, d: x - d.mean(), "mean on the latent"),
    "std": (lambda x, d: x / x.std(), "std on the latent"),
    "branch": (lambda x, d: x if x.clamp(0, 1) > 0.5 else d, "gt on the latent"),
    "equal": (lambda x, d: x if torch.equal(x, d) else d, "looks at the latent's numbers"),
    "a part": (lambda x, d: x[:, :1] + d, "a part of the latent, of 2x1x3x5"),
    "flip": (lambda x, d: x.flip(-1), "flip on the latent"),
    "blur": (lambda x, d: torch.nn.functional.avg_pool2d(x, 3, 1, 1), "avg_pool2d on the latent"),
    "own noise": (lambda x, d: x + torch.bernoulli(torch.full_like(x, 0.5)), "a tensor of its own"),
    "own tensor": (lambda x, d: torch.zeros_like(x).copy_(d), "writes the latent into a tensor of its own"),
    "other size": (lambda x, d: x + torch.zeros(3, 1, 1, 1, 1), "3x2x4x3x5, not of the latent's 2x4x3x5"),
    "infinite": (lambda x, d: x * float("inf"), "computes with inf"),
    "rounded": (lambda x, d: torch.div(x, 3.0, rounding_mode="floor"), "in a way that a program does not know"),
    "stacked": (lambda x, d: torch.stack([x, d]).mean(0), "mean on stacked tensors"),
    "otherwise stacked": (lambda x, d: torch.cat([torch.stack([x, d])]), "cat on stacked tensors"),
    "nothing": (lambda x, d: torch.ones(2, 4, 3, 5), "not made of the model's answers"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_program_is_refused(name, inference):
    change, sentence = REFUSED[name]
    with torch.inference_mode(inference), pytest.raises(NotAProgram, match=sentence):
        on_tape(change)


@FEW
@given(st.integers(1, 10_000), st.integers(0, 30))
def test_a_look_at_the_numbers_is_found_wherever_it_is(seed, place):
    """The linear part of a sampler may be anything; one branch on a value makes it no program."""
    random = np.random.default_rng(seed)
    moves = [
        lambda x, d: x * float(random.uniform(0.5, 1.5)) + d,
        lambda x, d: torch.lerp(x, d, float(random.uniform())),
        lambda x, d: x.add_(d) / 3.0,
        lambda x, d: x - torch.tensor(float(random.uniform())) * d,
    ]

    def change(x, d):
        for step in range(31):
            if step == place:
                x = x if bool((x.reshape(-1)[0] > 0).item()) else -x
            x = moves[random.integers(len(moves))](x, d)
        return x

    with pytest.raises(NotAProgram):
        on_tape(change)


@pytest.mark.parametrize("name", ["o1.0", "o0.2", "v999", "x0", "", "nn"])
def test_unknown_values_are_refused(name):
    program = Multistep(1, steps=2, order=1, states=1, pure=False, noisy=False).program()
    first = dataclasses.replace(program.calls[1], x=name)
    with pytest.raises(ValueError, match=f"uses '{name}' before call 1, where it is not known yet"):
        SamplerProgram(**{**vars(program), "calls": [program.calls[0], first]})


def test_unknown_operations_are_refused():
    program = Multistep(1, steps=2, order=1, states=1, pure=False, noisy=False).program()
    after = [*program.after, Operation(function="eval", operands=["noise"], result="w")]
    with pytest.raises(ValueError, match="'eval', which is no known operation"):
        dataclasses.replace(program, after=after)


def test_calls_out_of_order_are_caught():
    program = Multistep(1, steps=3, order=1, states=1, pure=False, noisy=False).program()
    begin, noises = tensors(program)
    run = Replay(program, **begin, noises=noises)
    with pytest.raises(AssertionError, match="call 1 asked for while call 0 is next"):
        run.model_input(1)
    with pytest.raises(AssertionError, match="only 0 calls"):
        run.output()


def opcodes(work):
    """How many of Python's instructions `work` takes: what it costs, on a busy machine too."""
    count = 0

    def step(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_recording_and_replaying_take_time_in_proportion_to_the_steps():
    def work(steps):
        sampler = Multistep(0, steps=steps, order=3, states=2, pure=True, noisy=True)

        def record_and_replay():
            program = messages.decode(*messages.encode(sampler.program()))
            replay(program, *tensors(program, (1, 4, 2, 2)))

        return opcodes(record_and_replay)

    work(2)
    few, many = work(40), work(160)
    assert many <= 4.2 * few, (few, many)


def test_a_record_computes_with_a_few_numbers_however_large_the_latent():
    recorder = SamplerRecorder(torch.zeros(1, 16, 128, 96))
    x = recorder.value("noise", torch.arange(16 * 128 * 96.0).reshape(1, 16, 128, 96))
    first = x.cell.numbers
    assert (first.shape[-1], first.min(), first.max()) == (SAMPLE, 0.0, 16 * 128 * 96 - 1.0)
    denoised = recorder.call(x, sigma=1.0, timestep=1.0, conds=[0], network=lambda x, k: x / 2)[0]
    made = (x - denoised) * 3.0
    assert made.shape == x.shape and torch.equal(made.cell.numbers, first / 2 * 3.0)


def test_a_tensor_of_an_earlier_run_is_refused():
    old = SamplerRecorder().value("noise")
    with pytest.raises(NotAProgram, match="of an earlier run"):
        SamplerRecorder().value("noise") + old


def test_memory_order_is_that_of_the_real_operations():
    """A tensor drawn like another one fills in the order in which that one lies in memory."""
    latent = torch.zeros(2, 4, 6, 5).to(memory_format=torch.channels_last)
    noise = torch.zeros(2, 4, 6, 5)
    recorder = SamplerRecorder(noise)
    traced = {"noise": recorder.value("noise", noise), "latent": recorder.value("latent", latent)}
    for name, other in (("latent", "noise"), ("noise", "latent")):
        real = {"noise": noise, "latent": latent}
        made = traced[name] * 0.5 + traced[other]
        assert made.stride() == (real[name] * 0.5 + real[other]).stride()
        assert torch.zeros_like(made).stride() == torch.zeros_like(real[name] * 0.5 + real[other]).stride()
