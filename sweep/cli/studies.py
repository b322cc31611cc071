"""The command that shows what tuning has chosen, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table as Grid

from sweep.cli.common import (
    AsJson,
    File,
    Results,
    SafeConsole,
    UserError,
    app,
    count,
    echo,
    say,
    show_json,
)

if TYPE_CHECKING:
    from sweep.planning.tuning import State, Try


@app.command(epilog="Example: sweep studies experiments/laptop/r1-tuned.yaml")
def studies(
    file: File,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make Optuna's studies anew from the ledger first.")
    ] = False,
    results: Results = "results",
    as_json: AsJson = False,
) -> None:
    """Say which learning rate each cell of a sweep with `tune:` takes, and by what figures."""
    from sweep.ledger.errors import without_password
    from sweep.ledger.ledger import Ledger
    from sweep.planning import tuning
    from sweep.sweepfile.expansion import load

    sweep, ledger = load(file), Ledger(results)
    if not sweep.studies:
        example = "tune: {learning_rate: {log: [1.0e-5, 1.0e-2], points: 8}}"
        raise UserError(f"{file}: tune: missing; its learning rates are given. Try `{example}`")
    if rebuild:
        told = tuning.record(sweep, ledger, rebuild=True)
        place = without_password(tuning.where(sweep, ledger))
        say(f"{place}: {count(told, 'point')} of {count(len(sweep.studies), 'cell')}")
    states = tuning.states(sweep, ledger)
    if as_json:
        show_json([_record(state) for state in states])
        return
    _print(states)
    for note in tuning.notes(sweep):
        echo(note)


def _print(states: Sequence[State]) -> None:
    """A line a cell: its rates with their figures, the chosen one marked."""
    by = states[0].study.tune.by
    accuracy = by.endswith("_accuracy")
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    measured = by.replace("_", " ") + (", per cent" if accuracy else "")
    for column in ("cell", "rate", measured, ""):
        grid.add_column(column, overflow="fold")
    for state in states:
        cell = escape(state.study.label)
        for one in sorted(state.tries, key=lambda one: one.rate):
            figure = "-"
            if one.value is not None:
                figure = f"{100 * one.value:.2f}" if accuracy else f"{one.value:.4f}"
            grid.add_row(cell, f"{one.rate:g}", figure, ", ".join(_said(state, one)))
            cell = ""
        if state.why:
            grid.add_row(cell, "", "", state.why)
    SafeConsole().print(grid)


def _said(state: State, one: Try) -> Iterable[str]:
    """What is to be said of a rate."""
    if one.rate == state.chosen:
        yield "chosen, at the edge of the range: widen it" if state.at_edge else "chosen"
    if one.state != "done":
        yield "not finished" if one.state == "open" else one.state


def _record(state: State) -> dict[str, Any]:
    """A study as JSON values."""
    return {
        "cell": state.study.label,
        "labels": state.study.labels,
        "by": state.study.tune.by,
        "chosen": state.chosen,
        "at_edge": state.chosen is not None and state.at_edge,
        "why": state.why or None,
        "points": [
            {
                "learning_rate": one.rate,
                "state": one.state,
                "value": one.value,
                "trials": [point.trial_id for point in one.trials],
            }
            for one in sorted(state.tries, key=lambda one: one.rate)
        ],
    }
