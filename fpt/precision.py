"""The numerics classes, and what a device has to have for one. Imports torch only where bf16 is
asked about: the planner asks too, and does without.

fp32 runs anywhere. bf16 is refused where no hardware multiplies bfloat16: emulated it would be
slower than fp32, and there would be nothing left to be said for it.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

Numerics = Literal["fp32", "bf16"]

AMX = "amx_bf16"
"""What torch calls a processor's products of tiles of bfloat16, with sums in fp32."""

BFLOAT16 = frozenset({AMX, "avx512_bf16", "bf16", "sve_bf16"})
"""And those of vectors on x86 and on ARM. Where there are only these, a process that trains first
measures whether they are faster than fp32: see `fpt.exactness.bfloat16_is_faster`."""

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
    elif (found := cpu_capabilities()) is None or found & BFLOAT16:
        return None
    else:
        has = "this processor has none of them"
    named = ", ".join(sorted(BFLOAT16))
    return (
        f"numerics bf16: needs a processor that multiplies bfloat16 (one of {named} in "
        "torch.cpu.get_capabilities()) or a CUDA device of compute capability {}.{} or later; {}; "
        "use numerics fp32".format(*CAPABILITY, has)
    )


def cpu_capabilities() -> frozenset[str] | None:
    """Return what this machine's processor has, by torch's names; None where torch is not installed
    or too old to tell.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    tell = getattr(torch.cpu, "get_capabilities", None)
    return None if tell is None else frozenset(name for name, has in tell().items() if has is True)
