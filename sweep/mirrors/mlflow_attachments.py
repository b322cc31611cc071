"""What the parent run of a sweep carries at the end of a run: claims, figures and the report."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sweep.ledger.ledger import Ledger
from sweep.sweepfile.trials import Sweep


@contextmanager
def fonts() -> Iterator[None]:
    """Keep the list of fonts that matplotlib writes when it is first imported out of the home
    folder.
    """
    with tempfile.TemporaryDirectory(prefix="fpt-sweep-fonts-") as folder:
        ours = os.environ.setdefault("MPLCONFIGDIR", folder) == folder
        try:
            yield
        finally:
            if ours:
                del os.environ["MPLCONFIGDIR"]


def _claims(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    if sweep.spec.claims:
        from sweep.analysis.claims import show

        judged = show(sweep, ledger)
        (folder / "claims.md").write_text(judged.to_markdown(), encoding="utf-8")
        text = json.dumps(judged.record(), indent=2, default=str)
        (folder / "claims.json").write_text(text, encoding="utf-8")


def _figures(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    from sweep.analysis import figures

    for drawn in figures.draw(figures.gather(sweep, ledger)):
        if drawn.chart is not None:
            (folder / "figures").mkdir(exist_ok=True)
            figures.save(drawn.chart.figure, folder / "figures" / drawn.kind)


def _report(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    from sweep.analysis.report import render

    (folder / "report.html").write_text(render(sweep, ledger), encoding="utf-8")


Maker = Callable[[Sweep, Ledger, Path], None]
"""Writes files about a sweep into a folder."""

MAKERS: Mapping[str, Maker] = {"claims": _claims, "figures": _figures, "report": _report}
"""What the parent run carries at the end of a run, and what makes it."""
