"""Why an attempt at a trial failed: the causes of the ledger, and which exceptions they are of.

`data` and `code` wait for a person; all others are the environment's doing, and are tried again.
PyTorch raises most of what a device does as a RuntimeError (`torch.AcceleratorError` is one), so
that these are told apart by their messages: those of the CUDA runtime, of cuBLAS, cuDNN and their
kin, of ROCm and of Apple's Metal. What a process may take (`ulimit`, a cgroup) and what a node's
installation lacks show up as an ImportError, an OSError or a RuntimeError.
"""

from __future__ import annotations

import errno
import re
import sys
from typing import Literal, get_args

from fpt.files import ContractError, DataError
from sweep.ledger.storage import LedgerError

Cause = Literal[
    "data",
    "code",
    "memory",
    "device",
    "worker",
    "node",
    "storage",
    "hung",
    "preempted",
    "interrupted",
]
"""Why an attempt at a trial came to nothing."""

MARKS = ("doubled", "retried", "forgotten")
"""No failures. doubled: the attempt ended well, and somebody else's row was there first. retried:
failures before it no longer count. forgotten: the trial's row was discarded on purpose, and
failures before it no longer count either."""

CAUSES = (*get_args(Cause), *MARKS)
"""Why an attempt failed, or what a mark says that is no failure."""

RESETS = ("retried", "forgotten")
"""Marks before which no failure counts."""

Halt = Literal["interrupted", "preempted"]
"""Why an attempt is to end before its trials have."""

STOPS: tuple[Halt, ...] = get_args(Halt)
"""Causes that are no fault: the attempt was told to end, and saved its state."""

WAITS = ("code", "data")
"""Causes of failure that a run does not try again: nothing but a change can mend them."""

ENDS_PROCESS = ("memory", "device", "node")
"""Causes after which a worker's process must not train again: what an allocator keeps would fail
the next trial too, a CUDA context stays broken, and a library that was loaded in part stays so."""

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)

_LOADER = re.compile(
    r"failed to map segment|cannot map zero-fill|cannot allocate memory in static TLS"
    r"|cannot change memory protections|cannot create (shared object|cache|search|TLS)"
    r"|file too short|cannot read file data|cannot open shared object file(?!.*Permission)",
    re.IGNORECASE,
)
"""What the dynamic loader says where a machine, not the library's name, is at fault."""

_THREADS = re.compile(
    r"can't start new thread|thread constructor failed|pthread_create|resource temporarily unav"
    r"|too many open files",
    re.IGNORECASE,
)
"""What a process says that may have no more threads, processes or files."""

_ALLOCATION = re.compile(
    r"out of memory|can(no|')t allocate memory|not enough memory|std::bad_alloc"
    r"|(CU|HIP|ROC|MIOPEN)\w*_ALLOC(ATION)?_FAILED|_(DEVICE|HOST)_ALLOCATION_FAILED"
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory",
    re.IGNORECASE,
)
"""An allocation that failed, on a device or a host."""

_DEVICE = re.compile(
    r"\b(CUDA|HIP)( driver| runtime)? error\b|\bc?u(BLAS|DNN|FFT|SOLVER|SPARSE|RAND)\w* error"
    r"|\bC?U(BLAS|DNN|SOLVER|SPARSE|RAND)_STATUS_|\bCUFFT_|\bMIOPEN_STATUS_|\bHIPBLAS_STATUS_"
    r"|cudaGetDeviceCount|cudaError|hipError|No CUDA GPUs are available|NVML"
    r"|CUDA driver initialization failed|found no NVIDIA driver",
    re.IGNORECASE,
)
"""Anything that the runtime of a device, or one of its libraries, has raised."""

_PROGRAM = re.compile(
    r"device-side assert|\binvalid \w+|_INVALID_|_BAD_PARAM|not.supported|stream is capturing",
    re.IGNORECASE,
)
"""Of these, what a program asked for that no device would do: an index outside of a table."""


class NodeError(Exception):
    """A node that cannot do what it says that it can."""


def cause_of(error: BaseException) -> Cause:
    """Return the cause of a failure, by its exception."""
    if isinstance(error, ContractError):
        return "code"
    if isinstance(error, DataError):
        return "data"
    if isinstance(error, NodeError):
        return "node"
    if isinstance(error, LedgerError):
        return "storage"
    torch = sys.modules.get("torch")  # where torch was never imported, none of its errors is raised
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return "memory"
    if isinstance(error, OSError):
        if error.errno in _STORAGE:
            return "storage"
        if error.errno in _LIMITS:
            return "node"
        if error.errno == errno.ENOMEM:
            return "memory"
    if not isinstance(error, ImportError | OSError | RuntimeError):
        return "code"
    text = str(error)
    if _LOADER.search(text) or _THREADS.search(text):
        return "node"
    if _ALLOCATION.search(text):
        return "memory"
    # To most of CUDA's errors PyTorch adds lines of advice, which name other errors.
    what = text.partition("\n")[0]
    return "device" if _DEVICE.search(text) and not _PROGRAM.search(what) else "code"


def ends_process(error: BaseException) -> bool:
    """Return whether a process in which this was raised must not train again.

    Also what is the program's fault breaks a CUDA context for good: a device-side assert.
    """
    broken = isinstance(error, RuntimeError) and _DEVICE.search(str(error)) is not None
    return broken or cause_of(error) in ENDS_PROCESS
