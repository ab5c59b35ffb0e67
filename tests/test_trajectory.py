"""Sampler programs: short rows, eager freeing and slices give what the whole recurrence gives."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_xdit import messages
from comfy_xdit.history import Column, History
from comfy_xdit.trajectory import Replay, SamplerCall, SamplerPreview, SamplerProgram

FEW = settings(max_examples=25, deadline=None)


class Multistep:
    """A made-up sampler: x' = a·x + b·x_before + Σ c_k·d_{i-k} + u·e_i.1 + s·noise, with random coefficients.

    order: answers read by a step. states: inputs read by a step (1 or 2).
    """

    def __init__(self, seed, *, steps, order, states, pure, noisy):
        random = np.random.default_rng(seed)
        self.steps, self.order, self.states, self.pure, self.noisy = steps, order, states, pure, noisy
        self.a = random.uniform(0.3, 0.9, steps)
        self.b = random.uniform(-0.5, 0.5, steps)
        self.c = random.uniform(0.1, 0.9, (steps, order))
        self.u = random.uniform(0.1, 0.5, steps)
        self.s = random.uniform(0.1, 0.5, steps)
        self.scale = random.uniform(0.5, 3.0, (steps, 3))

    def columns(self):
        columns = [Column(term="noise", born=None), Column(term="latent", born=None)]
        for i in range(self.steps):
            columns += [Column(term=name, born=i + 1) for name in (f"d{i}", f"e{i}.0", f"e{i}.1", f"n{i}")]
        return columns

    def run(self, vector, model):
        """vector(term) and model(i, x) → (d, uncond); the same code for numbers and for coordinates."""
        x = 2.0 * vector("noise") + 0.5 * vector("latent")
        before, answers, inputs = x, [], []
        for i in range(self.steps):
            inputs.append(x)
            d, uncond = model(i, x)
            answers.insert(0, d)
            after = self.a[i] * x + sum(c * d for c, d in zip(self.c[i], answers, strict=False))
            if self.states == 2:
                after = after + self.b[i] * before
            if self.pure:
                after = after + self.u[i] * uncond
            if self.noisy:
                after = after + self.s[i] * vector(f"n{i}")
            before, x = x, after
        return inputs, x

    def program(self):
        columns = self.columns()
        index = {column.term: j for j, column in enumerate(columns)}

        def vector(term):
            return np.eye(len(columns))[index[term]]

        inputs, output = self.run(vector, lambda i, x: (vector(f"d{i}"), vector(f"e{i}.1")))
        history = History(columns)
        calls, previews = [], []
        for i, row in enumerate(inputs):
            scale, skip, gain = map(float, self.scale[i])
            short = history.shorten(row)
            history.add_input(row)
            calls.append(
                SamplerCall(
                    sigma=1.0 - i / self.steps,
                    timestep=1000.0 - i,
                    input=short,
                    known={},
                    input_scale=scale,
                    skip=skip,
                    gain=gain,
                    conds=[0, 1],
                    guide={"0": 3.0, "1": -2.0},
                )
            )
            preview = history.shorten(vector(f"d{i}"))
            previews.append(SamplerPreview(after=i, step=i, total=self.steps, denoised=preview))
        return SamplerProgram(
            conds=["positive", "negative"], calls=calls, previews=previews, output=history.shorten(output)
        )


@st.composite
def samplers(draw):
    return Multistep(
        draw(st.integers(0, 10_000)),
        steps=draw(st.integers(1, 14)),
        order=draw(st.integers(1, 4)),
        states=draw(st.integers(1, 2)),
        pure=draw(st.booleans()),
        noisy=draw(st.booleans()),
    )


def network(x, k):
    """Nonlinear and elementwise, of operations that round alike everywhere in a tensor."""
    return x / (1.0 + x.abs()) * 0.7 + 0.1 * (k + 1)


def tensors(program, shape=(2, 4, 6, 5)):
    generator = torch.Generator().manual_seed(3)
    names = ("noise", "latent", *range(len(program.calls)))
    made = {name: torch.randn(shape, generator=generator) for name in names}
    return made.pop("noise"), made.pop("latent"), made


def replay(program, noise, latent, noises, **options):
    """Output, previews, and the most tensors held while the network ran."""
    run = Replay(program, noise=noise, latent=latent, noises=noises, **options)
    shown, peak = [], 0
    for i, call in enumerate(program.calls):
        x = run.model_input(i)
        peak = max(peak, run.num_held)
        run.answer(i, run.denoised(i, [network(x, k) for k in call.conds]))
        shown += [progress.denoised for progress in run.previews(i)]
    return run.output(), shown, peak


@FEW
@given(samplers())
def test_replay_equals_the_recurrence(sampler):
    program = sampler.program()
    noise, latent, noises = tensors(program)
    given_terms = {"noise": noise.double(), "latent": latent.double()}
    given_terms |= {f"n{j}": tensor.double() for j, tensor in noises.items()}

    def model(i, x):
        scale, skip, gain = sampler.scale[i]
        both = [skip * x + gain * network(scale * x, k) for k in (0, 1)]
        return 3.0 * both[0] - 2.0 * both[1], both[1]

    _, expected = sampler.run(given_terms.__getitem__, model)
    double = [tensor.double() for tensor in (noise, latent)]
    output, shown, _ = replay(program, *double, noises, dtype=torch.float64)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert len(shown) == sampler.steps


@FEW
@given(samplers())
def test_only_recent_history_is_held(sampler):
    program = sampler.program()
    noise, latent, noises = tensors(program)
    eager, shown, peak = replay(program, noise, latent, noises)
    full, shown_full, everything = replay(program, noise, latent, noises, keep=True)
    assert torch.equal(eager, full)
    assert all(torch.equal(a, b) for a, b in zip(shown, shown_full, strict=True))
    assert peak == program.peak_held() <= everything
    # A state and the answers but the newest; twice that at most where two states are carried.
    assert peak <= sampler.states * (1 + sampler.order + sampler.pure)
    assert program.noises() == (list(range(sampler.steps)) if sampler.noisy else [])
    last_call = max(program.last_use().items(), key=lambda item: item[1])
    assert last_call[1] <= 2 * sampler.steps


@FEW
@given(samplers(), st.data())
def test_a_slice_replays_as_the_whole_bit_for_bit(sampler, data):
    program = sampler.program()
    noise, latent, noises = tensors(program)
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(noise.shape, generator=generator) if data.draw(st.booleans()) else None
    if mask is not None:
        program = masked(program)
    whole, shown, _ = replay(program, noise, latent, noises, mask=mask)
    rows = sorted(data.draw(st.sets(st.integers(1, 5), max_size=3)) | {0, 6})
    for begin, end in itertools.pairwise(rows):
        cut = [tensor[:, :, begin:end] for tensor in (noise, latent)]
        patch = None if mask is None else mask[:, :, begin:end]
        part, part_shown, _ = replay(
            program, *cut, lambda j, begin=begin, end=end: noises[j][:, :, begin:end], mask=patch
        )
        assert torch.equal(part, whole[:, :, begin:end])
        pairs = zip(part_shown, shown, strict=True)
        assert all(torch.equal(a, b[:, :, begin:end]) for a, b in pairs)


def masked(program):
    known = [{"noise": call.sigma, "latent": 1.0 - call.sigma} for call in program.calls]
    changed = [{**vars(call), "known": row} for call, row in zip(program.calls, known, strict=True)]
    calls = [SamplerCall(**fields) for fields in changed]
    return SamplerProgram(**{**vars(program), "calls": calls})


def test_mask_keeps_the_known_latent():
    program = masked(Multistep(5, steps=4, order=2, states=1, pure=False, noisy=True).program())
    noise, latent, noises = tensors(program)
    run = Replay(program, noise=noise, latent=latent, noises=noises, mask=torch.zeros_like(noise))
    for i, call in enumerate(program.calls):
        expected = call.sigma * noise + (1.0 - call.sigma) * latent
        torch.testing.assert_close(run.input(i), expected, rtol=1e-6, atol=1e-6)
        run.answer(i, [torch.full_like(noise, float("inf")).nan_to_num(posinf=7.0)] * 2)
        torch.testing.assert_close(run.previews(i)[0].denoised, latent, rtol=0, atol=0)
    free = replay(program, noise, latent, noises, mask=torch.ones_like(noise))[0]
    plain = Multistep(5, steps=4, order=2, states=1, pure=False, noisy=True).program()
    assert torch.equal(free, replay(plain, noise, latent, noises)[0])


@FEW
@given(samplers())
def test_travels_as_json(sampler):
    program = sampler.program()
    text, carried = messages.encode(program)
    assert carried == [] and json.loads(text)
    assert messages.decode(text, []) == program


def test_long_rows_become_short():
    program = Multistep(1, steps=40, order=2, states=1, pure=False, noisy=True).program()
    assert all(
        set(call.input) == {f"x{i}", f"d{i}", f"d{i - 1}", f"n{i}"}
        for i, call in [(i, program.calls[i + 1]) for i in range(1, 39)]
    )
    assert program.peak_held() == 2


def test_a_row_with_no_short_form_stays_whole():
    columns = [Column(term="noise", born=None)]
    columns += [Column(term=f"d{i}", born=i + 1) for i in range(20)]
    history = History(columns)
    for i in range(20):
        history.add_input(np.eye(21)[i])
    row = np.linspace(1.0, 2.0, 21)
    assert list(history.shorten(row).values()) == list(row)


def test_the_start_may_come_back_in_every_step():
    columns = [Column(term="noise", born=None), Column(term="d0", born=1), Column(term="d1", born=2)]
    history = History(columns)
    history.add_input(np.array([1.0, 0.0, 0.0]))
    assert history.shorten(np.array([0.5, 0.5, 0.0])) == {"x0": 0.5, "d0": 0.5}


def test_rows_do_not_magnify_what_is_held():
    """A hundred of the latest input would do, and would make a hundred of its rounding."""
    columns = [Column(term="noise", born=None), Column(term="d0", born=1), Column(term="d1", born=2)]
    history = History(columns)
    for row in ([1.0, 0.0, 0.0], [0.01, 0.99, 0.0]):
        history.add_input(np.array(row))
    short = history.shorten(np.array([1.0, 0.5, -0.5]))
    assert short == pytest.approx({"x0": 1.0, "d0": 0.5, "d1": -0.5})


@pytest.mark.parametrize("term", ["x1", "d1", "e1.0", "e0", "d0.1", "y0", "", "x-1"])
def test_unknown_terms_are_refused(term):
    program = Multistep(1, steps=2, order=1, states=1, pure=False, noisy=False).program()
    fields = vars(program.calls[1]) | {"input": {term: 1.0}}
    with pytest.raises(ValueError, match="before it is known"):
        SamplerProgram(**{**vars(program), "calls": [program.calls[0], SamplerCall(**fields)]})


def test_calls_out_of_order_are_caught():
    program = Multistep(1, steps=3, order=1, states=1, pure=False, noisy=False).program()
    noise, latent, noises = tensors(program)
    run = Replay(program, noise=noise, latent=latent, noises=noises)
    with pytest.raises(AssertionError, match="call 1 asked for while call 0 is next"):
        run.input(1)
    with pytest.raises(AssertionError, match="only 0 calls"):
        run.output()
