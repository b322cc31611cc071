"""Commands that put a sweep on paper: its report and its figures."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sweep.cli.common import (
    File,
    Quiet,
    Results,
    app,
    echo,
    note,
    reading,
    say,
    writing,
)


class Kind(StrEnum):
    """Figures that `sweep figures` draws."""

    curves = "curves"
    convergence = "convergence"
    tuning = "tuning"
    budget = "budget"
    learning_rate = "learning-rate"
    depth = "depth"
    size = "size"
    trained = "trained"
    effects = "effects"


@app.command(epilog="Example: sweep report experiments/quickstart.yaml -o report.html")
def report(
    file: File,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The page.")
    ] = Path("report.html"),
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Write one page of everything: table, claims, figures, cost, failures, provenance."""
    from sweep.analysis.report import render
    from sweep.sweepfile.expansion import load

    page = render(load(file), reading(results), results=results)
    with writing(output):
        output.write_text(page, encoding="utf-8")
    note(f"{output}: written")


@app.command(epilog="Example: sweep figures experiments/quickstart.yaml -o figures --only curves")
def figures(
    file: File,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A folder for the figures.")
    ],
    only: Annotated[
        list[Kind] | None, typer.Option("--only", help="A kind of figure; may be repeated.")
    ] = None,
    results: Results = "results",
) -> None:
    """Draw the sweep's figures as PDF, SVG and PNG, and say why some cannot be drawn."""
    from sweep.analysis.figures import draw, gather, save
    from sweep.sweepfile.expansion import load

    material = gather(load(file), reading(results).snapshot())
    drawn = 0
    for drawing in draw(material, [kind.value for kind in only or ()]):
        if drawing.chart is None:
            say(f"not drawn: {drawing.kind}: {drawing.why}")
            continue
        with writing(output):
            files = save(drawing.chart.figure, output / f"{material.sweep.name}-{drawing.kind}")
        echo("\n".join(map(str, files)))
        drawn += 1
    if not drawn:
        say(f"{file}: nothing to draw yet")
        raise typer.Exit(1)
