"""Make the pictures of docs/images from a real run: `python docs/pictures.py FILE RESULTS`.

Runs a sweep file as `sweep run` does and keeps the live view as it stood when half of the trials
had ended (an SVG of the terminal), and draws its figures and its report afterwards. The report is
photographed by Chromium. Nothing in a picture is made by hand.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from sweep.analysis.report import render
from sweep.cli.common import SafeConsole
from sweep.cli.progress import View
from sweep.execution.driver import run
from sweep.execution.scheduler import Event
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load

IMAGES = Path(__file__).parent / "images"
WIDTH = 100
"""Columns of the terminal."""


def photograph_run(file: Path, results: str) -> None:
    """Train what is missing, and keep the view when half of it had ended."""
    planned = plan(file, results)
    steps = {p.trial_id: p.config.steps for pack in planned.packs for p in pack.points}
    view = View(SafeConsole(file=StringIO(), width=WIDTH), steps)
    camera = SafeConsole(record=True, file=StringIO(), width=WIDTH, force_terminal=True)
    taken = False

    def follow(event: Event) -> None:
        nonlocal taken
        view(event)
        moving = sum(trial.step > 0 for trial in view.running.values())
        if not taken and view.ended >= len(steps) // 2 and moving >= 2:
            camera.print(view.render())
            taken = True

    with view:
        run(planned.sweep, results=results, on_event=follow, mirror=False)
    if taken:
        camera.save_svg(str(IMAGES / "live-view.svg"), title=f"sweep run {file}")


def photograph_report(file: Path, results: str) -> None:
    """Take the upper part of the report, 1280 pixels wide."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("pictures: no Chromium on this machine; the report needs one")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(render(load(file), Ledger(results)), encoding="utf-8")
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={folder}/browser", "--window-size=1280,1000",
                f"--screenshot={IMAGES / 'report.png'}", f"file://{page}",
            ],
            check=True, capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    photograph_run(Path(sys.argv[1]), sys.argv[2])
    photograph_report(Path(sys.argv[1]), sys.argv[2])
