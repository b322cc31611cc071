"""Causes by exceptions: the words are those that PyTorch, CUDA's libraries and the loader use."""

from __future__ import annotations

import errno

import pytest

from fpt.files import DataError
from sweep.ledger.causes import ENDS_PROCESS, NodeError, cause_of, ends_process
from sweep.ledger.ledger import LedgerError

ASYNC = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace
below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Device-side assertion tracking was not enabled by user."""

MEMORY = [
    "CUDA error: out of memory" + ASYNC,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "HIP error: hipErrorOutOfMemory",
    "MPS backend out of memory (MPS allocated: 17.9 GiB, max allowed: 18.1 GiB)",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
]
DEVICE = [
    "CUDA error: uncorrectable ECC error encountered" + ASYNC,
    "CUDA error: an illegal memory access was encountered" + ASYNC,
    "CUDA error: unspecified launch failure" + ASYNC,
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: misaligned address",
    "CUDA error: all CUDA-capable devices are busy or unavailable",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: no CUDA-capable device is detected",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: unknown error",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, ...)`",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm(...)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA driver error: invalidated",
    "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    "No CUDA GPUs are available",
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1131",
    "HIP error: unspecified launch failure",
]
PROGRAM = [
    "CUDA error: device-side assert triggered" + ASYNC,
    "CUDA error: invalid configuration argument",
    "CUDA error: invalid device ordinal",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(...)`",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`",
    "cuDNN error: CUDNN_STATUS_BAD_PARAM",
]
PLAIN = [
    "mat1 and mat2 shapes cannot be multiplied (4x10 and 12x16)",
    "Expected all tensors to be on the same device, but found cuda:0 and cpu!",
    "element 0 of tensors does not require grad and does not have a grad_fn",
]


@pytest.mark.parametrize(
    ("text", "cause", "ends"),
    [(text, "memory", True) for text in MEMORY]
    + [(text, "device", True) for text in DEVICE]
    + [(text, "code", True) for text in PROGRAM]
    + [(text, "code", False) for text in PLAIN],
)
def test_a_devices_error_has_its_cause_by_its_words(text: str, cause: str, ends: bool) -> None:
    error = RuntimeError(text)

    assert (cause_of(error), ends_process(error)) == (cause, ends)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError("/x/libgomp.so.1: cannot allocate memory in static TLS block"),
        ImportError("libcudnn.so.9: cannot open shared object file: No such file or directory"),
        ImportError("/x/_C.so: file too short"),
        OSError("libcublas.so.12: cannot map zero-fill pages"),
        RuntimeError("can't start new thread"),
        RuntimeError("thread constructor failed: Resource temporarily unavailable"),
        OSError(errno.EMFILE, "Too many open files"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        NodeError("no CUDA"),
    ],
)
def test_what_a_node_lacks_is_the_nodes(error: Exception) -> None:
    assert cause_of(error) == "node"
    assert ends_process(error)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
        (LedgerError("results: out of memory"), "storage"),
        (DataError("CUDA error"), "data"),
        (ModuleNotFoundError("No module named 'mine'"), "code"),
        (ImportError("cannot import name 'draw' from 'mine'"), "code"),
        (ValueError("CUDA error: out of memory"), "code"),
        (FileNotFoundError(errno.ENOENT, "nothing there"), "code"),
    ],
)
def test_other_errors_are_told_apart_by_what_they_are(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause
    assert ends_process(error) == (cause in ENDS_PROCESS)


def test_torchs_own_errors_are_known() -> None:
    torch = pytest.importorskip("torch")

    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert cause_of(raised.value) == "memory"
    assert cause_of(torch.OutOfMemoryError("Allocation on device 0")) == "memory"
    assert cause_of(torch.AcceleratorError("CUDA error: misaligned address")) == "device"
