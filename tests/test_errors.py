"""Whose an error is: what users read, and what becomes of the pool, hangs on it."""

from __future__ import annotations

import errno

import pytest
import torch
from comfy_xdit_worker.failures import classify

from comfy_xdit.errors import InputError, is_out_of_memory
from comfy_xdit.pool.membership import failure_of

OUT_OF_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:1331, unhandled cuda error\n"
        "Last error:\nFailed to CUDA calloc async 608 bytes"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 4096 bytes from file </dev/shm/x>: Cannot allocate memory (12)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_memory_in_the_words_of_every_library(error):
    assert is_out_of_memory(error)
    kind, sentence = classify(error, 3)
    assert kind == "memory" and sentence.startswith("worker 3 ran out of memory") and "\n" not in sentence


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("view size is not compatible with input tensor's size (spans across memory boundaries)"),
        ValueError("out of memory"),
        OSError(errno.ENOENT, "No such file"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_nothing_else_is_memory(error):
    assert not is_out_of_memory(error)


def test_an_input_error_is_its_own_sentence():
    assert classify(InputError("7 is too large;\n use 6"), 1) == ("input", "7 is too large; use 6")


def test_an_error_of_any_length_reaches_the_coordinator_as_one():
    """The coordinator drops who says more than a sentence, and would tell that the worker had ended."""
    kind, sentence = classify(RuntimeError("Missing key(s) in state_dict: " + '"blocks.0.attn.weight", ' * 10_000), 0)
    failure = {"rank": 0, "kind": kind, "message": sentence, "trace": "", "has_communicated": False}
    assert failure_of({"failure": failure}, 1) == failure
    assert sentence.startswith("worker 0 failed: RuntimeError: Missing key(s)") and sentence.endswith("…")
