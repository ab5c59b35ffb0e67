"""Faults put into the project, each found by the checks of `test_cuda_paths.py`; and the model of NCCL by itself."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cuda_checks import hangs, kernels_per_block, loop_waits
from events import Follow, Kernel, Launch, Wait
from nccl_sim import differences, stuck
from rehearsal import Case, play
from test_cuda_paths import FP8, LIMITS, ONCE_A_JOB, _kinds, within

from comfy_xdit.models import flux_call
from comfy_xdit.models.resident import CastLinear
from comfy_xdit.parallel import attention, kernels, links, sharded
from comfy_xdit.parallel.agreement import Agreement

ULYSSES = Case(degrees={"ulysses": 2}, steps=2)


def records(case):
    return [[*one.loaded, *one.ran] for one in play(case)]


def planted(place, name, make):
    """`make` of the function that was there takes its place."""
    return mock.patch.object(place, name, make(getattr(place, name)))


def test_positions_left_on_the_host():
    with (
        planted(flux_call, "token_ids", lambda ids: lambda *given: ids(*given).cpu()),
        pytest.raises(AssertionError, match="CPU"),
    ):
        play(ULYSSES)


def test_a_tensor_of_another_ranks_device():
    with (
        planted(flux_call, "guidance", lambda old: lambda *given: old(*given) + torch.ones(1, device="cuda:0")),
        pytest.raises(AssertionError, match=r"\['cuda:0'.*at rank 1"),
    ):
        play(ULYSSES)


def test_a_weight_that_is_not_cast():
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)

    wrong = pytest.raises(AssertionError, match=r"mm of .*bfloat16.*float8")
    with mock.patch.object(CastLinear, "forward", forward), wrong:
        play(Case(**FP8))


def test_arithmetic_in_fp8():
    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight * 2).to(x.dtype), self.bias)

    with mock.patch.object(CastLinear, "forward", forward), pytest.raises(AssertionError, match="mul of fp8"):
        play(Case(**FP8))


def test_attention_to_keys_of_another_type():
    def mixed(old):
        return lambda q, k, v, **given: old(q, k.float(), v, **given)

    with planted(kernels, "attention", mixed), pytest.raises(AssertionError, match=r"attention of .*bfloat16.*float32"):
        play(Case())


def test_a_kernel_that_the_card_has_not_got():
    with (
        mock.patch.object(kernels, "choose", lambda q, **given: "flash"),
        pytest.raises(AssertionError, match=r"flash_attention of .* on a card of \(7, 5\)"),
    ):
        play(Case(degrees={"ring": 2}, capability=(7, 5)))


def test_a_collective_on_a_tensor_that_is_not_contiguous():
    def total(x, axis):
        dist.all_reduce(x.transpose(0, 1), group=axis.group)
        return x

    with mock.patch.object(sharded, "total", total), pytest.raises(AssertionError, match=r"all_reduce.*not contiguous"):
        play(Case(degrees={"tensor": 2}, batch=2))


def test_a_collective_of_one_rank_alone():
    def lonely(old):
        def go_on(self):
            if dist.get_rank() == 0:
                dist.all_reduce(torch.zeros(1, device="cuda"))
            return old(self)

        return go_on

    with planted(Agreement, "go_on", lonely):
        found = records(ULYSSES)
    assert any("all_reduce" in sentence for sentence in differences(found))
    assert stuck(found)


@pytest.mark.parametrize("numbers", [lambda rank: 4 + rank, lambda rank: 4.0 if rank else 4], ids=["sizes", "dtypes"])
def test_collectives_that_are_unlike(numbers):
    def unlike(old):
        def go_on(self):
            number = numbers(dist.get_rank())
            dtype = torch.float32 if isinstance(number, float) else torch.bfloat16
            dist.all_reduce(torch.zeros(int(number), dtype=dtype, device="cuda"))
            return old(self)

        return go_on

    with planted(Agreement, "go_on", unlike):
        assert "differ" in differences(records(ULYSSES))[0]


def test_an_all_to_all_of_other_sizes():
    def skewed(old):
        def exchange(send, sent, received, axis):
            return old(send, sent, [size - (axis.index == 1) for size in received], axis).new_empty(sum(received))

        return exchange

    with planted(attention, "exchange", skewed):
        assert "all_to_all" in differences(records(ULYSSES))[0]


WAITS = {
    "item": lambda q: q.flatten()[0].item(),
    "bool": lambda q: bool((q.flatten()[:1] > 0).any()),
    "nonzero": lambda q: q.flatten()[:4].nonzero(),
    "copy to the host": lambda q: q.flatten()[:4].cpu(),
    "copy from the host": lambda q: torch.tensor([1.0], device=q.device),
    "cuda.synchronize": lambda q: torch.cuda.synchronize(),
    "Stream.synchronize": lambda q: torch.cuda.current_stream().synchronize(),
    "Event.synchronize": lambda q: torch.cuda.Event().synchronize(),
    "cudaFree": lambda q: torch.cuda.empty_cache(),
    "pinned memory": lambda q: KEPT.append(torch.empty(7, pin_memory=True)),
}
KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize("kind", WAITS)
def test_the_host_waits_in_each_layer(kind):
    def waiting(old):
        def attend(q, *given, **options):
            WAITS[kind](q)
            return old(q, *given, **options)

        return attend

    with planted(kernels, "attention", waiting):
        one = play(Case(steps=2))[0]
    waits = _kinds(loop_waits(one.ran))
    name = "item" if kind == "bool" else kind
    assert not waits <= ONCE_A_JOB and waits[name] >= 4, "twice in each of two evaluations"


def test_the_host_waits_in_each_step():
    def waiting(old):
        def go_on(self):
            torch.zeros(1, device="cuda").item()
            return old(self)

        return go_on

    with planted(Agreement, "go_on", waiting):
        short, long = (play(Case(steps=steps))[0] for steps in (2, 4))
    assert _kinds(loop_waits(long.ran)) - _kinds(loop_waits(short.ran)) == Counter(item=2)


def test_a_receive_that_is_posted_too_early():
    """Before the launch of what its sender needs: nobody hangs until somebody waits for a device."""

    def early(old):
        def expect(self, *given):
            old(self, *given)
            post(self, 1)

        return expect

    post = links.Inbox.post
    with planted(links.Inbox, "expect", early), mock.patch.object(links.Inbox, "post", lambda self, num=None: None):
        found = hangs(play(Case(degrees={"pipe": 2})))
    assert any(sentence.startswith("lazy loading") for sentence in found)
    assert sum("waits once" in sentence for sentence in found) >= 5
    assert any("at each launch" in sentence for sentence in found)
    assert not any(sentence.startswith("as it is") for sentence in found)


def test_more_kernels_in_a_block():
    def copying(old):
        return lambda q, k, v, **given: old(q.clone(), k, v, **given)

    with planted(kernels, "attention", copying):
        launched = kernels_per_block([one.ran for one in play(Case(steps=2))])
    assert not within(launched, LIMITS["flux 1 rank"])


def message(number, source, to, group="g"):
    return Launch(number, "p2p", group, (0, 1), (), ((source, to, 8, "float32"),), "here")


def reduce(number, group):
    return Launch(number, "all_reduce", group, (0, 1), (), (), "here")


def connected(*events):
    """After both groups' communicators were made."""
    return [reduce(8, "g"), Follow(8), reduce(9, "h"), Follow(9), *events]


def test_a_send_meets_its_receive():
    sends, receives = [message(1, 0, 1), Follow(1)], [message(1, 0, 1), Follow(1), Kernel("add", False)]
    assert not stuck([sends, receives]) and not differences([sends, receives])
    assert set(stuck([sends, [Kernel("add", False)]])) == {0}, "nothing is buffered"


def test_two_that_send_first_hang_but_not_in_groups_of_their_own():
    def ranks(*groups):
        return [
            connected(message(1, rank, 1 - rank, groups[rank]), message(2, 1 - rank, rank, groups[1 - rank]))
            for rank in (0, 1)
        ]

    assert set(stuck(ranks("g", "g"), eager=True)) == {0, 1}
    assert not stuck(ranks("g", "h"), eager=True)


def test_collectives_in_another_order_hang():
    one, other = [reduce(1, "g"), Follow(1), reduce(2, "h"), Follow(2)], [reduce(1, "h"), Follow(1), reduce(2, "g")]
    assert set(stuck([one, other])) == {0, 1}
    assert not stuck([one, one])


def test_a_wait_for_the_device_waits_for_a_posted_receive():
    # The other sends when it has got what is launched after the wait.
    waits = [message(1, 1, 0, "g"), Wait("cudaFree", True, "here"), message(2, 0, 1, "h"), Follow(1)]
    other = [message(1, 0, 1, "h"), Follow(1), message(2, 1, 0, "g")]
    assert stuck([connected(*waits), connected(*other)], eager=True)
    waits[1] = Wait("item", False, "here")
    assert not stuck([connected(*waits), connected(*other)], eager=True), "the compute stream alone is not held up"
    waits[1] = Kernel("add", True)
    both = [connected(*waits), connected(*other)]
    assert not stuck(both, eager=True)
    assert stuck(both, eager=True, lazy_loading=True) and stuck(both, eager=True, held=[(0, both[0].index(waits[1]))])
