"""What torch's RPC does for a peer past our unpickler: why a pool on several machines needs a trusted network.

Nothing in torch refuses its built-in operators: they are found by name in C++, in one registry that Python can't
shorten, and run by an agent that takes no filter. When these tests fail, torch has learned to, and the docs and
`rpc.py` can say so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MEMBER = """
import runpy, sys
runpy.run_path(sys.argv[1] + "/comfy_xdit/mount.py")["mount"]("comfy_xdit", "comfy_xdit_worker")
import torch
from torch._C import _distributed_rpc as c
from torch.distributed import rpc as torch_rpc
from comfy_xdit.pool.rpc import RpcMember, RpcGroup

rank, store, secret = int(sys.argv[2]), sys.argv[3], sys.argv[4]
member = RpcMember(pool="p", generation=1, store=f"file://{store}", interface="lo", rank=rank, num_processes=2)
group = RpcGroup(member)
group.join(None if rank == 0 else lambda serial, text, tensors: (text, tensors))
if rank == 1:
    sys.stdin.read()
else:
    to = torch_rpc.get_worker_info(member.name(1))
    found = c._invoke_rpc_builtin(to, "aten::from_file", 20.0, secret, False, 6, dtype=torch.uint8).wait()
    print(bytes(found.tolist()).decode())
    try:
        torch_rpc.rpc_sync(to.name, print, args=("x",), timeout=20)
    except RuntimeError as error:
        print("refused" in str(error))
print("left", flush=True)
group.leave()
"""


@pytest.fixture
def members(tmp_path):
    """A peer and a worker of one RPC group, joined as ours are."""
    (tmp_path / "secret").write_text("secret")
    command = [sys.executable, "-c", MEMBER, str(ROOT)]
    rest = [str(tmp_path / name) for name in ("store", "secret")]
    with subprocess.Popen([*command, "1", *rest], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        peer = subprocess.run([*command, "0", *rest], capture_output=True, text=True, timeout=120)
        worker.stdin.close()
        worker.wait(60)
    return peer


def test_a_peer_runs_builtin_operators_in_a_worker_and_no_function_of_pythons(members):
    assert members.stdout.split() == ["secret", "True", "left"], members.stderr
    docs = " ".join((ROOT / "docs" / "pool.md").read_text().split())
    assert "RPC's built-in operators" in docs and "can read and write files as you" in docs
