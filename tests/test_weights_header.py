"""Safetensors headers: the sound are read, the others refused with a sentence; nothing large is allocated."""

import json
import os
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from comfy_xdit.weights.header import LIMIT_BYTES, read_header


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return str(path)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool)
    tensors = {str(kind): torch.zeros(3, 5).to(kind) for kind in kinds} | {"empty": torch.zeros(0, 4)}
    save_file(tensors | {"scalar": torch.tensor(2.0)}, str(path), metadata={"format": "pt"})
    infos = read_header(str(path))
    assert infos.keys() == tensors.keys() | {"scalar"}
    assert all(infos[key].shape == tuple(tensor.shape) for key, tensor in tensors.items())
    assert infos["torch.float8_e5m2"].dtype == "F8_E5M2" and infos["scalar"].shape == ()
    assert max(info.end for info in infos.values()) == path.stat().st_size


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{", "damaged header"),
        (b"[" * 100_000, "damaged header"),
        (b"\xff\xfe", "damaged header"),
        (b"[1]", "no table"),
        (b'{"a": 1, "a": 2}', "twice"),
        ({"a": 7}, "damaged entry for 'a'"),
        ({"a": entry() | {"shape": [-2]}}, "damaged entry"),
        ({"a": entry() | {"shape": [True, 2]}}, "damaged entry"),
        ({"a": entry() | {"shape": [2.0]}}, "damaged entry"),
        ({"a": entry() | {"shape": "ab"}}, "damaged entry"),
        ({"a": entry() | {"shape": [1] * 17}}, "damaged entry"),
        ({"a": entry() | {"shape": [2**80]}}, "damaged entry"),
        ({"a": entry() | {"data_offsets": [8, 0]}}, "damaged entry"),
        ({"a": entry() | {"data_offsets": [0, 8, 9]}}, "damaged entry"),
        ({"a": entry(dtype="F33")}, "not a known type"),
        ({"a": entry() | {"dtype": ["F32"]}}, "not a known type"),
        ({"a": entry(end=12)}, "not what its shape takes"),
        ({"a": entry(shape=(2**40, 2**40, 0), end=0)}, "a shape that no memory holds"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, "overlap"),
        ({"a": entry(shape=(2**40,), end=2**42)}, "cut off"),
        ({"a": entry(begin=8, end=16)}, "cut off"),
    ],
)
def test_unsound_headers(tmp_path, header, says):
    with pytest.raises(ValueError, match=says) as caught:
        read_header(raw(tmp_path / "bad.safetensors", header, b"12345678"))
    assert "bad.safetensors" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("content", [b"", b"123", b"\x10" + 7 * b"\0", b"\xff" * 64, b"not a model at all"])
def test_files_that_are_something_else(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file or is cut off"):
        read_header(str(tmp_path / "x"))


def test_a_pipe_is_refused_at_once(tmp_path):
    """Nobody writes to it."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors is a pipe or a device, not a file"):
        read_header(str(tmp_path / "pipe.safetensors"))


def test_other_formats_are_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ValueError, match=r"x\.gguf is a GGUF file"):
        read_header(str(tmp_path / "x.gguf"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is a pickle"):
        read_header(str(tmp_path / "x.pt"))


def test_a_long_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "long"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", LIMIT_BYTES + 1))
        file.truncate(LIMIT_BYTES + 100)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="the limit is"):
            read_header(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(str(tmp_path / "none"))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4)
)
def test_damage_never_crashes(tmp_path, cut, flips):
    path = tmp_path / "damaged"
    save_file({"a.weight": torch.zeros(4, 8), "a.bias": torch.zeros(4)}, str(path))
    content = bytearray(path.read_bytes())
    for place, value in flips:
        if place < len(content):
            content[place] = value
    path.write_bytes(content[: len(content) - cut])
    size = path.stat().st_size
    try:
        infos = read_header(str(path))
    except ValueError as error:
        assert str(error).startswith("damaged ")
    else:
        assert all(8 <= info.begin <= info.end <= size for info in infos.values())
