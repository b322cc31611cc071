"""Commands of a run."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sweep.cli.common import (
    AsJson,
    File,
    Results,
    UserError,
    app,
    count,
    counted,
    last_causes,
    matching,
    say,
    show_json,
    size,
    where_option,
)

if TYPE_CHECKING:
    from sweep.planning import Plan
    from sweep.trials import Point, Sweep


@app.command(epilog="Example: sweep run experiments/quickstart.yaml")
def run(
    file: File,
    results: Results = "results",
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Most packs at once; default: what the cores allow.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; default: this machine alone.")
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Train stale trials anew (an older task version).")
    ] = False,
    no_mirror: Annotated[
        bool, typer.Option("--no-mirror", help="Leave MLflow out; `sweep mirror` catches up.")
    ] = False,
) -> None:
    """Train what is missing. The same command again goes on where this one stopped."""
    from sweep.planning import plan as make_plan

    planned = make_plan(file, results, stale=stale)
    sweep = planned.sweep
    say(f"{sweep.name}: {size(sweep)}: {counted(planned.counts())}")
    for left_out in sweep.left_out:
        say(f"  left out: {left_out}")

    from sweep.driver import run as drive
    from sweep.progress import View, span

    steps = {p.trial_id: p.config.steps for pack in planned.packs for p in pack.points}
    with View(Console(stderr=True), steps) as view:
        summary = drive(
            sweep,
            results=results,
            address=address,
            max_concurrent=max_concurrent,
            stale=stale,
            on_event=view,
            mirror=not no_mirror,
        )
    counts = {
        "done": summary.done,
        "diverged": summary.diverged,
        "failed": summary.failed,
        "missing": summary.missing,
    }
    say(f"{sweep.name}: {counted(counts)}, in {span(summary.seconds)}")
    if description := sweep.spec.description.strip():
        say(f"\n{description}\n")
    for line in _next_steps(planned, results, counts, interrupted=summary.interrupted):
        say(line)
    raise typer.Exit(summary.exit_code)


def _next_steps(
    planned: Plan, results: str, counts: Mapping[str, int], *, interrupted: bool
) -> Iterable[str]:
    """What a user may want to do after a run."""
    file = shlex.quote(str(planned.sweep.file))
    where = where_option(results)
    rows = f"{results.rstrip('/')}/trials"
    if interrupted:
        yield f"  go on            {shlex.join(['sweep', *sys.argv[1:]])}"
    if counts["failed"]:
        yield f"  why it failed    sweep plan {file}{where}, then sweep show TRIAL{where}"
        yield f"  try again        sweep retry {file}{where}, then run again"
    if counts["done"] or counts["diverged"]:
        yield f"  the table        sweep table {file}{where}"
        yield f"  the runs         sweep ui{where}"
        yield f"  the rows         pandas.read_parquet({rows!r})"


@app.command(epilog="Example: sweep retry experiments/quickstart.yaml --cause code")
def retry(
    file: File,
    cause: Annotated[
        list[str] | None, typer.Option(help="Only failures by this cause: code or data.")
    ] = None,
    results: Results = "results",
) -> None:
    """Let failed trials run again, after what failed them was mended."""
    from sweep.ledger import Ledger
    from sweep.planning import plan as make_plan

    if unknown := set(cause or ()) - {"code", "data"}:
        raise UserError(
            f"--cause: no trial waits for {sorted(unknown)[0]!r}; allowed: code, data "
            "(what the environment caused is tried again by every run)"
        )
    ledger = Ledger(results, write=True)
    planned = make_plan(file, ledger)
    failed = [p for p in planned.sweep.all if planned.status[p.trial_id] == "failed"]
    if cause:
        last = last_causes(ledger)
        failed = [p for p in failed if last.get(p.trial_id) in cause]
    ledger.forgive([p.trial_id for p in failed])
    for point in failed:
        typer.echo(f"{point.trial_id} {point.label}")
    if failed:
        again = shlex.quote(str(file)) + where_option(results)
        say(f"{count(len(failed), 'trial')} will run again with: sweep run {again}")
    else:
        say(f"{file}: no trial waits for that")


@app.command(epilog="Example: sweep debug experiments/quickstart.yaml --only 'random/*' --steps 5")
def debug(
    file: File,
    only: Annotated[str, typer.Option(metavar="PATTERN", help="A label, glob or trial id.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Train no longer than this.")] = None,
    results: Results = "results",
) -> None:
    """Train one trial in this process, without Ray, so that a debugger works. Nothing is kept."""
    from sweep.trials import load

    point = _pick(load(file), only)
    config = point.config
    if steps is not None:
        config = config.model_copy(update={"steps": min(steps, config.steps)})
    backbones: dict[str, Path] = {}
    if point.parent is not None:
        from sweep.ledger import Ledger

        backbones[point.parent] = Ledger(results).backbone_file(point.parent)
    say(f"{point.trial_id} {point.label}: {count(config.steps, 'step')}; nothing is kept")

    from sweep.worker import train_on_this_core

    training = train_on_this_core([config], backbones=backbones, log_every=1)
    for record in training:
        typer.echo(
            f"step {record.step} {record.split} loss {record.loss:.4f} "
            f"accuracy {record.accuracy:.4f} ({record.seconds:.2f} s)"
        )
    outcome = training.outcomes[0]
    typer.echo(f"{outcome.outcome}, stopped by {outcome.stopped} after {outcome.steps} steps")


def _pick(sweep: Sweep, pattern: str) -> Point:
    """The first trial whose label or id matches."""
    found = matching(sweep, pattern)
    if len(found) > 1:
        say(f"{count(len(found), 'trial')} match {pattern!r}; the first one is trained")
    return found[0]


@app.command(epilog="Example: sweep status experiments/quickstart.yaml")
def status(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A sweep file.")] = None,
    results: Results = "results",
    as_json: AsJson = False,
) -> None:
    """Say how far a sweep is, or, without a file, what the ledger holds."""
    from sweep.driver import DRIVER
    from sweep.ledger import Ledger

    ledger = Ledger(results)
    said: dict[str, Any] = {
        "results": ledger.uri,
        "driver": next(iter(ledger.holders(DRIVER)), None),
    }
    if file is not None:
        from sweep.planning import plan as make_plan

        planned = make_plan(file, ledger)
        said |= {"sweep": planned.sweep.name, "trials": planned.counts()}
        unfinished = planned.status.keys() - ledger.done()
        said["begun"] = len(unfinished & ledger.states())
        said["reasons"] = Counter(planned.why.values())
    else:
        rows = ledger.trials()
        said["trials"] = Counter(rows.column("outcome").to_pylist())
        said["begun"] = len(ledger.states() - ledger.done())
        said["failures"] = Counter(last_causes(ledger).values())
        said["seconds"] = sum(rows.column("seconds").to_pylist())
    if as_json:
        show_json(said)
        return
    _status_lines(said)


def _status_lines(said: Mapping[str, Any]) -> None:
    from sweep.progress import span

    typer.echo(f"{said.get('sweep', said['results'])}: {counted(said['trials'])}")
    if said["begun"]:
        typer.echo(f"  {count(said['begun'], 'trial')} begun: a run goes on from the saved state")
    for reason, number in said.get("reasons", {}).items():
        typer.echo(f"  {count(number, 'trial')}: {reason}")
    if said.get("failures"):
        typer.echo(f"  failed, by cause: {counted(said['failures'])}")
    if said.get("seconds"):
        typer.echo(f"  trained for {span(said['seconds'])} in all")
    if driver := said["driver"]:
        typer.echo(f"  a driver runs on {driver['host']} (process {driver['pid']})")
