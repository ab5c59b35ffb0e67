"""Tensors of a mapped file: views where bytes lie well, copies where they don't, never another's bytes."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.weights.mapped import MappedFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_views_of_the_file(tmp_path, dtype):
    value = torch.randn(6, 8).to(dtype)
    save_file({"a": value, "b": value[:2].clone(), "none": torch.zeros(0, 3)}, str(tmp_path / "f"))
    file = MappedFile(str(tmp_path / "f"))
    for key, expected in (("a", value), ("b", value[:2])):
        got = file.tensor(key)
        assert got.dtype == dtype and torch.equal(got.float(), expected.float()) and file.holds(got)
    assert file.tensor("a").data_ptr() == file.tensor("a").data_ptr()
    assert file.holds(file.tensor("a").narrow(0, 2, 3)) and not file.holds(file.tensor("a").clone())
    assert file.tensor("none").shape == (0, 3)


def test_what_is_not_aligned_is_copied(tmp_path):
    value = torch.randn(3, 4)
    header = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 4)
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + value.numpy().tobytes())
    file = MappedFile(str(tmp_path / "f"))
    assert file.infos["a"].begin % 4 == 1
    assert torch.equal(file.tensor("a"), value) and not file.holds(file.tensor("a"))


def test_writing_to_a_view_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.ones(4)}, str(tmp_path / "f"))
    before = (tmp_path / "f").read_bytes()
    file = MappedFile(str(tmp_path / "f"))
    file.tensor("a").zero_()
    assert (tmp_path / "f").read_bytes() == before
    assert torch.equal(MappedFile(str(tmp_path / "f")).tensor("a"), torch.ones(4))


def test_quantised_numbers_are_refused(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.uint8)}, str(tmp_path / "f"))
    with pytest.raises(ValueError, match="a is kept as U8, which is a quantised layout"):
        MappedFile(str(tmp_path / "f")).tensor("a")
