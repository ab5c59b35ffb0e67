"""All ranks use one ComfyUI, and the same one."""

import pytest
from comfy_xdit_nodes.native.options import ASKED, same_everywhere, use_comfy
from comfy_xdit_nodes.pool import connect

from comfy_xdit.messages import Result
from comfy_xdit.pool.errors import PoolError

SAME = {"version": "0.33.0", "sources": "abc", "kitchen": "0.2"}


@pytest.mark.parametrize("name", ASKED)
def test_ranks_that_differ_are_told_apart(name):
    same_everywhere([Result(value=dict(SAME)) for _ in range(3)])
    with pytest.raises(PoolError, match=rf"{ASKED[name]}: rank 0 has {SAME[name]}, rank 2 none; give every") as raised:
        same_everywhere([Result(value=SAME), Result(value=SAME), Result(value={**SAME, name: ""})])
    assert raised.value.kind == "input"


@pytest.mark.skipif(use_comfy() is None, reason="this ComfyUI keeps to diffusers' classes")
def test_what_real_workers_answer(pools):
    pool = connect(pools(2))
    with pool.lease():
        answers = pool.call_all(use_comfy())
    assert len(answers) == 2 and answers[0].value.keys() == ASKED.keys()
    same_everywhere(answers)
