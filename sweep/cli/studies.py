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
    reading,
    say,
    show_json,
)

if TYPE_CHECKING:
    from sweep.planning.tuning import Candidate, StudyState


@app.command(epilog="Example: sweep studies experiments/laptop/r1-tuned.yaml")
def studies(
    file: File,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make Optuna's studies anew from the ledger first.")
    ] = False,
    results: Results = "results",
    as_json: AsJson = False,
) -> None:
    """Say which setting each cell of a sweep with `tune:` takes, and by what figures."""
    from sweep.ledger.errors import without_password
    from sweep.mirrors import optuna_studies
    from sweep.planning import tuning
    from sweep.sweepfile.expansion import load

    sweep, ledger = load(file), reading(results)
    if not sweep.studies:
        example = "tune: {learning_rate: {log: [1.0e-5, 1.0e-2], points: 8}}"
        raise UserError(f"{file}: tune: missing; its learning rates are given. Try `{example}`")
    if rebuild:
        told = optuna_studies.record(sweep, ledger, rebuild=True)
        place = without_password(optuna_studies.where(sweep, ledger))
        say(f"{place}: {count(told, 'point')} of {count(len(sweep.studies), 'cell')}")
    states = tuning.states(sweep, ledger)
    if as_json:
        show_json([_record(state) for state in states])
        return
    _print(states)
    for note in tuning.notes(sweep):
        echo(note)


def _print(states: Sequence[StudyState]) -> None:
    """A line a cell and point: its setting with its figure, the chosen one marked; then budgets."""
    from sweep.planning.tuning import in_order
    from sweep.sweepfile.metrics import is_accuracy

    tune = states[0].study.tune
    accuracy = is_accuracy(tune.by)
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    measured = tune.by.replace("_", " ") + (", per cent" if accuracy else "")
    names = ["rate"] if tune.rate_alone else list(tune.spaces)
    for column in ("cell", *names, measured, ""):
        grid.add_column(column, overflow="fold")
    for state in states:
        cell = escape(state.study.label)
        for one in in_order(state.candidates):
            figure = "-" if one.value is None else _figure(one.value, accuracy=accuracy)
            setting = dict(one.setting)
            values = [_value(setting.get(name)) for name in tune.spaces]
            grid.add_row(cell, *values, figure, ", ".join(_said(state, one)))
            cell = ""
        if state.why:
            grid.add_row(cell, *[""] * len(names), "", state.why)
    SafeConsole().print(grid)
    for state in states:
        for line in _budgets(state, accuracy=accuracy):
            echo(f"{state.study.label}: {line}")


def _value(value: object) -> str:
    """What a field is set to; nothing where it is not tuned."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _figure(value: float, *, accuracy: bool) -> str:
    return f"{100 * value:.2f}" if accuracy else f"{value:.4f}"


def _budgets(state: StudyState, *, accuracy: bool) -> Iterable[str]:
    """Return what another budget would have given, and what made points good."""
    best = state.expected_best()
    shown = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if k < len(best)]
    if shown:
        told = [f"{k} {_figure(best[k - 1], accuracy=accuracy)}" for k in (*shown, len(best))]
        yield f"expected best of so many of its points: {', '.join(told)}"
    if found := state.importance():
        told = [f"{name} {share:.0%}" for name, share in found.items()]
        yield f"importance of its fields (PED-ANOVA): {', '.join(told)}"


def _said(state: StudyState, one: Candidate) -> Iterable[str]:
    """Return what is to be said of a point."""
    if one.setting == state.setting:
        if state.study.tune.rate_alone:
            yield "chosen, at the edge of the range: widen it" if state.at_edge else "chosen"
        else:
            edges = [f"{name} at the edge of its range" for name in state.edges]
            yield f"chosen, {', '.join(edges)}" if edges else "chosen"
    if one.state == "pruned":
        yield f"given up after {one.trials[0].config.steps:,} steps"
    elif one.state != "done":
        yield "not finished" if one.state == "open" else one.state


def _record(state: StudyState) -> dict[str, Any]:
    """Return a study as JSON values."""
    from sweep.planning.tuning import in_order

    return {
        "cell": state.study.label,
        "labels": state.study.labels,
        "by": state.study.tune.by,
        "chosen": state.chosen,
        "setting": None if state.setting is None else dict(state.setting),
        "at_edge": state.setting is not None and state.at_edge,
        "why": state.why or None,
        "expected_best": state.expected_best(),
        "importance": state.importance(),
        "points": [
            {
                "learning_rate": one.rate,
                "setting": dict(one.setting),
                "state": one.state,
                "steps": one.trials[0].config.steps,
                "value": one.value,
                "trials": [point.trial_id for point in one.trials],
            }
            for one in in_order(state.candidates)
        ],
    }
