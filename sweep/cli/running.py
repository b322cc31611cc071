"""Commands of a run."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweep.cli.common import (
    AsJson,
    File,
    Only,
    Quiet,
    Results,
    SafeConsole,
    UserError,
    app,
    count,
    counted,
    echo,
    figures,
    in_hours,
    last_causes,
    note,
    say,
    show_json,
    size,
    where_option,
)

if TYPE_CHECKING:
    from sweep.ledger.ledger import Ledger
    from sweep.planning.plan import Plan
    from sweep.sweepfile.trials import Point, Sweep


def _some_time(hours: float | None) -> float | None:
    if hours is not None and not hours > 0:
        raise UserError(
            f"--hours {hours:g}: no time to run in; give hours above 0, such as 0.5, or leave it "
            "out: then `limits.hours` of the sweep file counts, and without that nothing ends a run"
        )
    return hours


@app.command(epilog="Example: sweep run experiments/quickstart.yaml")
def run(
    file: File,
    only: Only = None,
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
    hours: Annotated[
        float | None,
        typer.Option(callback=_some_time, help="Stop after so long; default: `limits.hours`."),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Forget trials that the file no longer has.")
    ] = False,
    no_mirror: Annotated[
        bool, typer.Option("--no-mirror", help="Leave MLflow out; `sweep mirror` catches up.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train what is missing. The same command again goes on where this one stopped."""
    from sweep.ledger.ledger import Ledger
    from sweep.planning.plan import plan as make_plan

    planned = make_plan(file, results, stale=stale, only=only or ())
    sweep = planned.sweep
    note(f"{sweep.name}: {size(sweep)}: {counted(planned.counts())}")
    for left_out in sweep.left_out:
        note(f"  left out: {left_out}")
    for warning in sweep.warnings:
        say(f"warning: {warning}")

    if not only:
        _tell_removed(sweep, Ledger(results), prune=prune)

    from sweep.cli.progress import View, span
    from sweep.execution.driver import run as drive

    steps = {p.trial_id: p.config.steps for pack in planned.packs for p in pack.points}
    steps |= {p.trial_id: p.config.steps for p in sweep.undecided}
    with View(SafeConsole(stderr=True), steps, quiet=quiet) as view:
        summary = drive(
            sweep,
            results=results,
            address=address,
            max_concurrent=max_concurrent,
            stale=stale,
            hours=hours,
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
        note(f"\n{description}\n")
    for line in _next_steps(
        planned, results, counts, interrupted=summary.interrupted, mirrored=not no_mirror
    ):
        note(line)
    raise typer.Exit(summary.exit_code)


def _tell_removed(sweep: Sweep, ledger: Ledger, *, prune: bool) -> None:
    """Name the trials that an earlier run of this sweep had and the file no longer has.

    Nothing becomes of them: their rows stay, and what is running goes on. With `prune` the states
    of those that were not finished are dropped, and they are not named again. What other sweeps
    have, too, keeps its states, and so does all as long as a driver runs.
    """
    from sweep.execution.driver import DRIVER

    before = ledger.notes.trial_list(sweep.name)
    now = {point.trial_id: point.label for point in sweep.all if not point.undecided}
    removed = {name: label for name, label in before.items() if name not in now}
    done, labels = ledger.done(), set(now.values())
    for name, label in removed.items():
        what = "finished" if name in done else "unfinished"
        gone = "no longer in the file" if label not in labels else "another trial in the file now"
        say(f"  {gone}: {label} ({name}, {what})")
    if prune and removed and ledger.holders(DRIVER):
        say("  a run is under way; --prune forgets them once it has ended")
        prune = False
    elif removed and prune:
        shared = (removed.keys() - done) & ledger.notes.of_other_sweeps(sweep.name)
        ledger.remove("states", removed.keys() - done - shared)
        say(f"  {count(len(removed), 'trial')} forgotten; rows of finished ones stay")
        if shared:
            say(f"  {len(shared):,} of them: other sweeps have them too, so their states stay")
    elif removed:
        say("  nothing becomes of them; --prune forgets them, and drops unfinished ones' states")
    ledger.notes.save_trial_list(sweep.name, now if prune else removed | now)


def _next_steps(
    planned: Plan,
    results: str,
    counts: Mapping[str, int],
    *,
    interrupted: bool,
    mirrored: bool,
) -> Iterable[str]:
    """Return what a user may want to do after a run."""
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
        if mirrored:
            yield f"  the runs         sweep ui{where}"
        yield f"  the rows         pandas.read_parquet({rows!r})"


@app.command(epilog="Example: sweep pause experiments/quickstart.yaml")
def pause(file: File, results: Results = "results", quiet: Quiet = False) -> None:
    """Ask whoever runs a sweep to stop. Running trials save their states; `sweep run` goes on."""
    from sweep.execution.driver import DRIVER
    from sweep.ledger.ledger import Ledger
    from sweep.sweepfile.expansion import load

    sweep, ledger = load(file), Ledger.existing(results, write=True)
    ledger.notes.pause(sweep.name)
    again = shlex.quote(str(file)) + where_option(results)
    if not ledger.holders(DRIVER):
        say(f"{sweep.name}: no driver is running")
    note(f"{sweep.name}: pauses within seconds; go on with: sweep run {again}")


@app.command(epilog="Example: sweep retry experiments/quickstart.yaml --cause code")
def retry(
    file: File,
    cause: Annotated[
        list[str] | None, typer.Option(help="Only failures by this cause: code or data.")
    ] = None,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Let failed trials run again, after what failed them was mended."""
    from sweep.ledger.ledger import Ledger
    from sweep.planning.plan import plan as make_plan
    from sweep.sweepfile.expansion import load

    if unknown := set(cause or ()) - {"code", "data"}:
        raise UserError(
            f"--cause: no trial waits for {sorted(unknown)[0]!r}; allowed: code, data "
            "(what the environment caused is tried again by every run)"
        )
    sweep, ledger = load(file), Ledger.existing(results, write=True)
    planned = make_plan(sweep, ledger)
    failed = [p for p in planned.sweep.all if planned.status[p.trial_id] == "failed"]
    if cause:
        last = last_causes(ledger)
        failed = [p for p in failed if last.get(p.trial_id) in cause]
    ledger.reset_failures([p.trial_id for p in failed])
    for point in failed:
        echo(f"{point.trial_id} {point.label}")
    if failed:
        again = shlex.quote(str(file)) + where_option(results)
        note(f"{count(len(failed), 'trial')} will run again with: sweep run {again}")
    else:
        note(f"{file}: no trial waits for that")


@app.command(epilog="Example: sweep debug experiments/quickstart.yaml --only 'random/*' --steps 5")
def debug(
    file: File,
    only: Annotated[str, typer.Option(metavar="PATTERN", help="A label, glob or trial id.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Train no longer than this.")] = None,
    results: Results = "results",
) -> None:
    """Train one trial in this process, without Ray, so that a debugger works. Nothing is kept."""
    from sweep.ledger.ledger import Ledger
    from sweep.planning.tuning import resolve
    from sweep.sweepfile.expansion import load

    point = _pick(resolve(load(file), Ledger(results)), only)
    if point.undecided:
        raise UserError(
            f"{file}: {point.label} has no learning rate yet: {point.undecided}; debug one of the "
            "trials that tune it"
        )
    config = point.config
    if steps is not None:
        config = config.model_copy(update={"steps": min(steps, config.steps)})
    backbones: dict[str, Path] = {}
    if point.parent is not None:
        backbones[point.parent] = Ledger(results).backbone_file(point.parent)
    say(f"{point.trial_id} {point.label}: {count(config.steps, 'step')}; nothing is kept")

    from fpt import contract
    from sweep.execution.worker import train_on_this_core

    for doubt in contract.check_trial(config, other_process=True):
        say(f"warning: {doubt}")
    training = train_on_this_core([config], backbones=backbones, log_every=1)
    for record in training:
        echo(
            f"step {record.step} {record.split} "
            f"{figures(record.loss, record.accuracy, record.metrics)} ({record.seconds:.2f} s)"
        )
    outcome = training.outcomes[0]
    echo(f"{outcome.outcome}, stopped by {outcome.stopped} after {outcome.steps} steps")


def _pick(sweep: Sweep, pattern: str) -> Point:
    """Return the first trial whose label or id matches."""
    found = sweep.matching(pattern)
    if len(found) > 1:
        say(f"{count(len(found), 'trial')} match {pattern!r}; the first one is trained")
    return found[0]


@app.command(epilog="Example: sweep status experiments/quickstart.yaml")
def status(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A sweep file.")] = None,
    results: Results = "results",
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Also the jobs there: http://HEAD:8265.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a sweep is, or, without a file, what the ledger holds."""
    from sweep.analysis.accounting import spent, spent_on
    from sweep.execution.driver import DRIVER
    from sweep.ledger.ledger import Ledger
    from sweep.planning import estimates

    ledger = Ledger(results)  # of a job that waits there is none yet
    drivers = ledger.holders(DRIVER)
    said: dict[str, Any] = {
        "results": ledger.uri,
        "driver": next(iter(drivers), None),
        "drivers": drivers,
    }
    if file is not None:
        from sweep.planning.plan import plan as make_plan

        planned = make_plan(file, ledger)
        said |= {"sweep": planned.sweep.name, "trials": planned.counts()}
        unfinished = planned.status.keys() - ledger.done()
        said["begun"] = len(unfinished & ledger.states())
        said["reasons"] = Counter(planned.why.values())
        causes = last_causes(ledger)
        said["failures"] = Counter(causes[name] for name in unfinished & causes.keys())
        said["spent"] = asdict(spent(planned.sweep, ledger))
        if (compared := estimates.compare(planned.sweep, ledger)) is not None:
            said["quote"] = asdict(compared)
        said["paused"] = ledger.notes.paused(planned.sweep.name)
        said["labels"] = {point.trial_id: point.label for point in planned.sweep.all}
        said["retry"] = planned.sweep.spec.retry.model_dump()
    else:
        rows = ledger.trials()
        said["trials"] = Counter(rows.column("outcome").to_pylist())
        said["begun"] = len(ledger.states() - ledger.done())
        said["failures"] = Counter(last_causes(ledger).values())
        said["spent"] = asdict(spent_on(None, ledger))
    if address is not None:
        from sweep.cluster import submission

        said["jobs"] = submission.jobs(submission.connect(address), said.get("sweep"))
    if as_json:
        show_json(said)
        return
    _status_lines(said)


def _quote_line(quote: Mapping[str, Any]) -> str:
    """Return what the last run was expected to cost, and what came of it."""
    what = "GPU" if quote["device"] == "cuda" else "core"
    told = (
        f"the last run's quote: {in_hours(quote['hours'])} {what}-hours "
        f"({in_hours(quote['low'])} to {in_hours(quote['high'])}) "
        f"for {count(quote['trials'], 'trial')}"
    )
    if not quote["done"]:
        return told
    return (
        f"{told}; {quote['done']:,} of them took {in_hours(quote['took'])}, where "
        f"{in_hours(quote['quoted'])} was quoted"
    )


def _spent_lines(spent: Mapping[str, Any]) -> Iterable[str]:
    """Return where the time went."""
    from sweep.cli.progress import span

    if spent["seconds"]:
        yield f"trained for {span(spent['seconds'])} in all"
    if lost := {cause: seconds for cause, seconds in spent["lost"].items() if seconds >= 1}:
        by = ", ".join(f"{cause} {span(lost[cause])}" for cause in sorted(lost))
        yield f"trained in vain for {span(sum(lost.values()))}: {by}"
    came = {"failed": spent["failed_attempts"], "stopped": spent["stopped_attempts"]}
    if any(came.values()):
        yield f"{count(spent['attempts'], 'attempt')}: {counted(came)}"
    if spent["doubled"]:
        yield f"{count(spent['doubled'], 'trial')} finished more than once; the first row stands"


def _driver_lines(
    driver: Mapping[str, Any], labels: Mapping[str, str], retry: Mapping[str, int | None]
) -> Iterable[str]:
    """Return what a driver does and what it waits for, by its last heartbeat."""
    from sweep.cli.progress import span

    note = driver.get("note") or {}
    # One ledger's driver may be that of another sweep.
    whose = f" of {note['sweep']}" if "sweep" in note else ""
    where = f"{driver['host']} (process {driver['pid']}), since {driver['since']}"
    yield f"a driver{whose} runs on {where}"
    for trial, how in note.get("running", {}).items():
        if not labels or trial in labels:
            at = "" if how["step"] is None else f", step {how['step']}"
            still = f", no step for {span(how['seconds'])}" if how["seconds"] > 60 else ""
            yield f"  {labels.get(trial, trial)}: {how['phase']}{at}{still}"
    if note.get("waiting"):
        yield f"  {count(note['waiting'], 'trial')}: no worker has begun yet"
    if elsewhere := note.get("elsewhere"):
        yield f"  {count(len(elsewhere), 'trial')}: another driver trains them"
    for trial, causes in note.get("tries", {}).items():
        for cause, number in causes.items():
            most = retry.get(cause)
            left = "" if most is None else f", {max(0, most - number)} more tries"
            yield f"  {labels.get(trial, trial)}: failed by {cause} {number} times{left}"


def _status_lines(said: Mapping[str, Any]) -> None:
    from sweep.ledger.causes import STOPS

    echo(f"{said.get('sweep', said['results'])}: {counted(said['trials'])}")
    if said["begun"]:
        echo(f"  {count(said['begun'], 'trial')} begun: a run goes on from the saved state")
    for reason, number in said.get("reasons", {}).items():
        echo(f"  {count(number, 'trial')}: {reason}")
    causes = said.get("failures", {})
    for how, among in (
        ("failed", causes.keys() - set(STOPS)),
        ("stopped", causes.keys() & set(STOPS)),
    ):
        if among:
            echo(f"  {how}, by cause: {counted({name: causes[name] for name in sorted(among)})}")
    for line in _spent_lines(said["spent"]):
        echo(f"  {line}")
    if said.get("quote"):
        echo(f"  {_quote_line(said['quote'])}")
    if said.get("paused"):
        echo("  paused: sweep run goes on")
    for driver in said["drivers"]:
        for line in _driver_lines(driver, said.get("labels", {}), said.get("retry", {})):
            echo(f"  {line}")
    for job in said.get("jobs", ()):
        echo(f"  job {job.id}: {job}")
