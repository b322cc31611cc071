"""The numerics classes, and what a device has to have for one. No torch: the planner asks too.

fp32 runs anywhere. bf16 is refused where no hardware multiplies bfloat16: emulated it would be
slower than fp32, and there would be nothing left to be said for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Numerics = Literal["fp32", "bf16"]

AMX, AVX512 = "amx_bf16", "avx512_bf16"
"""The flags of a processor that multiplies tiles, or vectors, of bfloat16, by Linux' names. Sums
are in fp32 either way. Where there is only the latter, a process that trains measures first whether
it is faster than fp32: see `fpt.exactness.bfloat16_is_faster`."""

CPU_FLAGS = Path("/proc/cpuinfo")
"""Where Linux lists the flags of its processors."""

CAPABILITY = (8, 0)
"""The least compute capability of a CUDA device with products in bfloat16."""


def refusal(numerics: Numerics, capability: tuple[int, int] | None = None) -> str | None:
    """Why a device cannot train in a numerics class; None if it can.

    Args:
        numerics: The class.
        capability: The compute capability of a CUDA device; None: this machine's processor.
    """
    if numerics == "fp32":
        return None
    if capability is not None:
        if capability >= CAPABILITY:
            return None
        has = "this GPU's is {}.{}".format(*capability)
    elif cpu_flags() & {AMX, AVX512}:
        return None
    else:
        has = "this processor has no such flag"
    return (
        f"numerics bf16: needs a processor that multiplies bfloat16 (the flag {AMX} or {AVX512} in "
        f"{CPU_FLAGS}) or a CUDA device of compute capability {{}}.{{}} or later; {{}}; use "
        "numerics fp32".format(*CAPABILITY, has)
    )


def cpu_flags() -> set[str]:
    """Return the flags of this machine's processors; none where Linux does not list them."""
    return set(CPU_FLAGS.read_text().split()) if CPU_FLAGS.exists() else set()
