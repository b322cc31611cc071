"""The numerics classes, and what a device has to have for one. No torch: the planner asks too.

fp32 runs anywhere. bf16 is refused where no hardware multiplies bfloat16: emulated it would be
slower than fp32, and there would be nothing left to be said for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Numerics = Literal["fp32", "bf16"]

CPU_FLAG = "amx_bf16"
"""The flag of a processor that multiplies tiles of bfloat16 (AMX), by Linux' name for it."""

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
    elif CPU_FLAGS.exists() and CPU_FLAG in CPU_FLAGS.read_text().split():
        return None
    else:
        has = "this processor has no such flag"
    return (
        f"numerics bf16: needs a processor with AMX (the flag {CPU_FLAG} in {CPU_FLAGS}) or a CUDA "
        "device of compute capability {}.{} or later; {}; use numerics fp32".format(
            *CAPABILITY, has
        )
    )
