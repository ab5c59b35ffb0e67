"""Process groups: a bounded number, made robustly, and never used again when messages may be under way."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, groups, plain_denoise, run_denoise, tiny_call

from comfy_xdit.parallel import groups as module
from comfy_xdit.parallel.context import ParallelContext
from comfy_xdit.parallel.groups import GroupCache
from comfy_xdit.parallel.sequence import total
from comfy_xdit.parallel.spec import ParallelSpec, products

NUM_RANKS = 4


@pytest.fixture
def ranks():
    with Ranks(NUM_RANKS) as started:
        yield started


def here(ranks: Ranks, function: str, **arguments: Any) -> list[Any]:
    return ranks.run("run_of", module="test_groups", function=function, arguments=arguments)


def sums_over(spec: ParallelSpec, cache: GroupCache) -> dict[str, float]:
    """The sum of the ranks' numbers on each axis, each in a message."""
    with ParallelContext(spec, cache) as context:
        names = [name for name in context._axes if context.axis(name).degree > 1]
        return {name: float(total(torch.tensor([float(cache.rank)]), context.axis(name))) for name in names}


def use_many(specs: list[ParallelSpec]) -> dict[str, Any]:
    """Job: sums over the axes of all specs, twice; the most groups and descriptors at any time."""
    cache = GroupCache(dist.get_world_size())
    known = len(dist.distributed_c10d._world.pg_map)
    sums, num_groups, num_files = [], [], []
    for spec in [*specs, *specs]:
        sums.append(sums_over(spec, cache))
        num_groups.append(len(dist.distributed_c10d._world.pg_map) - known)
        num_files.append(len(os.listdir("/proc/self/fd")))
    cache.close()
    return {
        "sums": sums,
        "groups": num_groups,
        "files": num_files,
        "left": len(dist.distributed_c10d._world.pg_map) - known,
    }


def test_groups_of_many_specs_are_a_bounded_number(ranks) -> None:
    specs = [spec for spec in products(NUM_RANKS, {"cfg": 2}) if spec.pipe == 1 or spec.distri == 1]
    assert len(specs) > 20
    for rank, found in enumerate(here(ranks, "use_many", specs=specs)):
        half = len(specs)
        assert found["sums"][:half] == found["sums"][half:]
        for spec, sums in zip(specs, found["sums"], strict=False):
            lines = lines_of(spec, rank)
            assert sums == {axis: float(sum(ranks)) for axis, ranks in lines.items()}
        assert max(found["groups"]) == module.MAX_KEPT and found["left"] == 0
        assert max(found["files"][half:]) <= max(found["files"][:half])


def lines_of(spec: ParallelSpec, rank: int) -> dict[str, list[int]]:
    """Which ranks a rank's axes have, where more than one, worked out by counting places."""
    own = places(spec, rank)
    joined = {axis: (axis,) for axis in own} | {name: ("pipe",) for name in module.LINKS} | module.JOINED
    found = {}
    for name, axes in joined.items():
        line = [
            other
            for other in range(spec.num_ranks)
            if all(axis in axes or place == own[axis] for axis, place in places(spec, other).items())
        ]
        if len(line) > 1:
            found[name] = line
    return found


def places(spec: ParallelSpec, rank: int) -> dict[str, int]:
    found = {}
    for axis, degree in reversed(spec.degrees.items()):
        rank, found[axis] = divmod(rank, degree)
    return found


def test_the_least_recently_used_go_first() -> None:
    """Those of a job are never among them, also where it has more than the limit."""
    freed: list[Any] = []
    cache = GroupCache(NUM_RANKS)
    stand_ins = {
        "rank": 0,
        "_make": lambda self, key: key,
        "_line": lambda self, key: key,
        "_free": lambda self, keys: [freed.append(self._kept.pop(key)) for key in keys],
    }
    with mock.patch.multiple(GroupCache, **stand_ins), mock.patch.object(module, "MAX_KEPT", 2):
        one = cache.lines(ParallelSpec(ulysses=4))["ulysses"]
        two = cache.lines(ParallelSpec(cfg=2, ulysses=2))
        assert freed == [one]
        # The same lines of ranks.
        other = cache.lines(ParallelSpec(ulysses=2, tensor=2))
        assert (other["ulysses"], other["tensor"]) == (two["cfg"], two["ulysses"]) and freed == [one]
        pipe = cache.lines(ParallelSpec(cfg=2, pipe=2))
        assert pipe["cfg"] == two["cfg"] and freed == [one, two["ulysses"]]
        assert list(cache._kept) == [pipe[name] for name in ("cfg", "pipe", "pipe odd", "pipe back")]


def churn(rounds: int) -> int:
    """Job: groups that are made and freed, with no message in between."""
    for _ in range(rounds):
        cache = GroupCache(dist.get_world_size())
        cache.lines(ParallelSpec(ulysses=dist.get_world_size()))
        cache.close()
    return rounds


def test_groups_are_freed_when_all_ranks_are_connected(ranks) -> None:
    """Else who is slow is told that its peer closed the connection, while it still connects."""
    assert here(ranks, "churn", rounds=60) == [60] * NUM_RANKS


def with_a_failure(failing: dict[int, int], wait_s: float) -> Any:
    """Job: sums over the axes of a spec; rank r fails to connect at its first `failing[r]` tries."""
    helper, left = dist.distributed_c10d._new_process_group_helper, failing.get(dist.get_rank(), 0)

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left and dist.get_rank() in kwargs.get("global_ranks_in_group", args[2] if len(args) > 2 else []):
            left -= 1
            raise RuntimeError("Gloo connectFullMesh failed with Connection closed by peer")
        return helper(*args, **kwargs)

    cache = GroupCache(dist.get_world_size())
    with (
        mock.patch.object(dist.distributed_c10d, "_new_process_group_helper", fails),
        mock.patch.object(module, "CONNECT_TIMEOUT_S", wait_s),
    ):
        try:
            return sums_over(ParallelSpec(cfg=2, ulysses=2), cache)
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize("failing", [{1: 1}, {0: 2, 3: 1}])
def test_ranks_that_cannot_connect_try_again_together(ranks, failing) -> None:
    """The others wait for its connection meanwhile, as long as a connection may take."""
    for rank, sums in enumerate(here(ranks, "with_a_failure", failing=failing, wait_s=1.0)):
        lines = lines_of(ParallelSpec(cfg=2, ulysses=2), rank)
        assert sums == {name: float(sum(line)) for name, line in lines.items()}


def test_ranks_that_never_connect_are_told_alike(ranks) -> None:
    answers = here(ranks, "with_a_failure", failing={2: 99}, wait_s=0.5)
    assert all("could not be connected with each other in 3 tries" in answer for answer in answers)


def fault_in_mid_message() -> list[tuple[str, bool]]:
    """Job: the errors of one that posts a receive and fails, and of one after it; and whether messages were sent."""
    found = []
    for fails in (True, False):
        error = ""
        try:
            with ParallelContext(ParallelSpec(ulysses=NUM_RANKS), groups()) as context:
                axis = context.axis("ulysses")
                assert not context.has_communicated
                if fails:
                    dist.irecv(torch.zeros(1), axis.ranks[axis.index - 1], group=axis.group)
                    raise ValueError("some library's")
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        found.append((error, groups().has_communicated))
    return found


def test_groups_are_not_used_again_after_a_fault_in_mid_message(ranks) -> None:
    """A receive that was posted would take the next job's message."""
    for (first, has_communicated), (second, _) in here(ranks, "fault_in_mid_message"):
        assert first == "ValueError: some library's" and has_communicated
        assert second == (
            "RuntimeError: a job failed after its first message to other ranks; this process must be restarted"
        )


def refused_then_right(degrees: dict[str, int], model: dict[str, Any], good: Any, bad: Any) -> tuple[str, bool, Any]:
    """Job: the sentence for a bad call, whether messages were sent by then, and the output of a good one after it."""
    sentence = ""
    try:
        run_denoise(model, [bad], [1], degrees)
    except ValueError as error:
        sentence = str(error)
    return sentence, groups().has_communicated, run_denoise(model, [good], [1], degrees)[0]


@pytest.mark.parametrize("degrees", [{"cfg": 2, "ulysses": 2}, {"ring": 2, "ulysses": 2}], ids=str)
def test_bad_input_is_refused_before_the_first_message(ranks, degrees) -> None:
    model = {"family": "sd3", "heads": 4}
    good = tiny_call("sd3", seed=0, batch=2, size=(8, 6), text=5)
    bad = {**good, "context": torch.zeros(2, 5, 13)}
    (want,) = plain_denoise(model, [good])
    answers = here(ranks, "refused_then_right", degrees=degrees, model=model, good=good, bad=bad)
    for rank, (sentence, has_communicated, output) in enumerate(answers):
        assert "text of 13 channels" in sentence and not has_communicated
        assert rank or (output[0] - want).abs().max() <= 1e-5


@pytest.mark.parametrize("batch", [2, 12])
def test_a_mask_of_queries_and_keys_is_not_dealt_as_rows(ranks, batch) -> None:
    """A rank that has one row of the batch would take the one query of its mask for all, one that has several fail."""
    model = {"family": "flux", "heads": 4}
    good = tiny_call("flux", seed=0, batch=batch, size=(8, 4), text=4)
    bad = {**good, "attention_mask": torch.zeros(batch, 12)}
    (want,) = plain_denoise(model, [good])
    answers = here(ranks, "refused_then_right", degrees={"cfg": 2, "ulysses": 2}, model=model, good=good, bad=bad)
    for rank, (sentence, has_communicated, output) in enumerate(answers):
        assert f"has the shape [{batch}, 12]; give [1, keys], or [batch, queries, keys]" in sentence
        assert not has_communicated
        assert rank or (output[0] - want).abs().max() <= 1e-5


def test_a_job_of_one_rank_sends_nothing() -> None:
    cache = GroupCache(1)
    for _ in range(2):
        with pytest.raises(KeyError), ParallelContext(ParallelSpec(), cache) as context:
            assert context.world is None and context.axis("ring").group is None
            raise KeyError
        assert not cache.has_communicated
