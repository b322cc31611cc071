"""Commands that keep the house: disk, MLflow."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweep.cli.common import (
    AsJson,
    File,
    Quiet,
    Results,
    UserError,
    app,
    count,
    echo,
    note,
    say,
    show_json,
    whole_id,
)

if TYPE_CHECKING:
    from sweep.ledger.ledger import Kind, Ledger


PATIENCE = 5.0
"""Seconds between two lines on how far the mirror is."""


@app.command(epilog="Example: sweep gc experiments/quickstart.yaml")
def gc(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Sweep files: only what their trials left."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Say what takes disk, and remove what nothing needs, after asking. Results always stay."""
    from sweep.ledger.ledger import Ledger
    from sweep.planning.plan import plan as make_plan

    ledger = Ledger.existing(results)
    plans = [make_plan(file, ledger) for file in files or ()]
    for kind, (objects, size) in ledger.usage().items():
        echo(f"{kind:<10} {count(objects, 'object'):>16} {size / 1e6:>12,.1f} MB")
    finished = ledger.done()
    offers: list[tuple[Kind, set[str] | None, str]] = [
        ("cache", None, "it is made again when it is needed")
    ]
    if plans:
        finished &= {trial for p in plans for trial in p.status}
        kept = {trial for p in plans if p.sweep.keep.backbones for trial in p.status}
        # A trained model is only whole with the backbone that it was trained on.
        whole = finished - ledger.states()
        points = [point for p in plans for point in p.sweep.all]
        needed = {point.parent for point in points if point.trial_id not in whole}
        unneeded = (ledger.backbones() & finished) - kept - needed
        why = "no trial of these files has yet to take them over, and no trained model needs them"
        offers.append(("backbones", unneeded, why))
        kept = {trial for p in plans if p.sweep.keep.trained for trial in p.status}
        lost = "of finished trials; fpt.load_model, and training these for longer, need them"
        offers.append(("states", (ledger.states() & finished) - kept, lost))
    elif ledger.backbones() or ledger.states():
        note("name sweep files to learn which states and backbones their trials no longer need")
    _idle(ledger)
    # A claim is worth as much as the lease of its driver.
    if claims := ledger.remove("leases", {"trials"}):
        note(f"{count(claims, 'claim')} of runs that were killed removed")
    for kind, ids, why in offers:
        objects = ledger.usage()[kind][0] if ids is None else len(ids)
        if not objects:
            continue
        question = f"Remove {count(objects, 'object')} of {kind}? ({why})"
        if not yes and not sys.stdin.isatty():
            say(f"{question} --yes does")
        elif yes or typer.confirm(question, err=True):
            _idle(ledger)  # a run may have started while nobody answered
            removed = ledger.remove(kind, ids)
            note(f"{count(removed, 'object')} of {kind} removed")


@app.command(epilog="Example: sweep compact --results results")
def compact(results: Results = "results", as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Put what finished trials left into few large files: a run does it where it pays."""
    from sweep.ledger.ledger import Ledger

    done = Ledger.existing(results, write=True).compact()
    if as_json:
        show_json(vars(done))
        return
    note(
        f"{results}: {count(done.trials, 'finished trial')} put together: "
        f"{count(done.segments, 'large file')} written, {count(done.files, 'small one')} removed"
    )


@app.command(epilog="Example: sweep forget 3f9a")
def forget(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial id, or how it begins.")],
    yes: Annotated[bool, typer.Option("--yes", help="Discard without asking.")] = False,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Discard the row of a finished trial, on purpose: the next run trains it anew."""
    from sweep.ledger.ledger import Ledger

    ledger = Ledger.existing(results, write=True)
    _idle(ledger)
    trial = whole_id(trial, ledger.done(), ledger.uri)
    columns = ["trial_id", "task", "outcome", "pretraining", "finished_at"]
    rows = {row["trial_id"]: row for row in ledger.trials(columns=columns).to_pylist()}
    row = rows[trial]
    when = f", finished {row['finished_at']:%Y-%m-%d %H:%M}" if row["finished_at"] else ""
    question = (
        f"Discard the row of trial {trial} ({row['task']}, {row['outcome']}{when}), with its "
        "curve, state and backbone?"
    )
    if not yes and not sys.stdin.isatty():
        raise UserError(f"{question} Nothing was discarded: --yes does it")
    if not yes:
        typer.confirm(question, abort=True, err=True)
        _idle(ledger)  # a run may have started while nobody answered
    if not ledger.forget(trial):
        raise UserError(f"{ledger.uri}: somebody else forgot trial {trial} meanwhile")
    note(f"trial {trial} is forgotten: a run of its sweep file trains it anew")
    if heirs := [n for n, one in rows.items() if one["pretraining"] == f"trial:{trial}"]:
        say(
            f"{count(len(heirs), 'trial')} trained on its backbone and kept what they have: "
            + ", ".join(heirs)
        )


def _idle(ledger: Ledger) -> None:
    from sweep.execution.driver import DRIVER

    if ledger.holders(DRIVER):
        raise UserError(f"{ledger.uri}: a run is under way; nothing is removed until it has ended")


@app.command(epilog="Example: sweep mirror experiments/quickstart.yaml --rebuild")
def mirror(
    file: File,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Delete the sweep's runs first, and make all anew.")
    ] = False,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Copy finished trials to MLflow: what a run left out, or everything."""
    from sweep.ledger.ledger import Ledger
    from sweep.mirrors.mlflow_runs import catch_up
    from sweep.mirrors.mlflow_stores import where
    from sweep.sweepfile.expansion import load

    _require_mlflow()
    sweep, ledger = load(file), Ledger.existing(results)
    told = time.monotonic()

    def tell(number: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PATIENCE:
            told = time.monotonic()
            note(f"  {count(number, 'trial')} mirrored so far")

    number = catch_up(sweep, ledger, rebuild=rebuild, mirrored=tell)
    note(f"{where(ledger)}: {count(number, 'trial')} mirrored")


@app.command(epilog="Example: sweep ui --port 5001")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 5000,
    results: Results = "results",
) -> None:
    """Serve the MLflow UI on this ledger's runs, on this machine alone. Ctrl-C ends it."""
    from sweep.ledger.ledger import Ledger
    from sweep.mirrors.mlflow_ui import serve_ui

    _require_mlflow()
    serve_ui(Ledger(results), port, ready=echo)


def _require_mlflow() -> None:
    from sweep.ledger import provenance

    if package := provenance.lacking(["mlflow"]):
        raise UserError(provenance.lacks(package))
