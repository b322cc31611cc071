"""A task whose training takes as long as a test likes, and whose figures do not depend on it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fpt import Batch, Splits
from fpt.tasks.base import ProtocolName, Source
from fpt.tasks.bits import BitXor


@dataclass(frozen=True)
class Slow:
    """Examples that are a while in coming."""

    source: Source

    def batch(self, seed: int, stream: int, step: int, size: int) -> Batch:
        if pace := os.environ.get("FPT_SWEEP_CHAOS_PACE"):
            Path(f"{pace}.{os.getpid()}").touch()  # so that tests know who trains
            time.sleep(float(Path(pace).read_text()))
        return self.source.batch(seed, stream, step, size)


class Paced(BitXor):
    """Bit XOR; the file that FPT_SWEEP_CHAOS_PACE names holds the seconds that a batch takes."""

    name: Literal["paced:Paced"] = "paced:Paced"

    def splits(self, protocol: ProtocolName) -> Splits:
        splits = super().splits(protocol)
        return replace(splits, train=Slow(splits.train))
