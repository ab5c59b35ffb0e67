"""Two machines tell whether they have the same file, from a few bytes of each tensor."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.weights.fingerprint import fingerprint


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(64, 33, generator=generator) for name in ("one", "two")} | {"small": torch.ones(1)}


def written(path, tensors):
    save_file(tensors, path)
    return str(path)


def test_a_gguf_file_is_told_by_its_bytes(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(range(256)) * 100)
    first = fingerprint(str(path))
    copied = shutil.copy(path, tmp_path / "b.gguf")
    assert fingerprint(str(copied)) == first
    copied.write_bytes(b"GGUF" + path.read_bytes()[4:])
    assert fingerprint(str(copied)) != first


def test_a_copy_has_the_same(tmp_path, tensors):
    first = written(tmp_path / "a.safetensors", tensors)
    copied = shutil.copy(first, tmp_path / "b.safetensors")
    assert fingerprint(first) == fingerprint(str(copied))


@pytest.mark.parametrize("name", ["one", "two", "small"])
def test_any_tensor_of_other_numbers_makes_another(tmp_path, tensors, name):
    first = fingerprint(written(tmp_path / "a.safetensors", tensors))
    assert fingerprint(written(tmp_path / "b.safetensors", tensors | {name: tensors[name] * 1.01})) != first


def test_other_names_and_shapes_make_another(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    found = {fingerprint(written(path, tensors))}
    found.add(fingerprint(written(path, {f"{name}.": tensor for name, tensor in tensors.items()})))
    found.add(fingerprint(written(path, tensors | {"one": tensors["one"].reshape(33, 64)})))
    # Read anew each time, though the path is the same.
    assert len(found) == 3


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        fingerprint(str(tmp_path / "a.safetensors"))
