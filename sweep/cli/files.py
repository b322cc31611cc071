"""Commands before a run: about sweep files, and what they need."""

from __future__ import annotations

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table as Grid

from sweep.cli.common import (
    AsJson,
    Only,
    Quiet,
    Results,
    SafeConsole,
    UserError,
    app,
    count,
    counted,
    echo,
    in_hours,
    note,
    say,
    show_json,
    size,
    writing,
)

if TYPE_CHECKING:
    from fpt.spec import JSON
    from sweep.analysis.foresight import Foresight
    from sweep.ledger.ledger import Ledger
    from sweep.planning.estimates import Quote
    from sweep.planning.plan import Plan
    from sweep.sweepfile.trials import Sweep

MOST_CHARACTERS = 100
"""Of a sweep's name."""

LISTED = 100
"""Trials that `plan` lists for people; `--json` lists all."""


@app.command(epilog="Example: sweep init my-sweep --template what-trains")
def init(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="Name of the sweep and its file.")],
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="TEMPLATE",
            help="What it asks about: modality, what-trains, size, tuned or quickstart. "
            "Default: NAME, if that is one of these, else modality.",
            autocompletion=lambda: _templates(),
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a sweep file to begin with, NAME.yaml, with comments; it validates and runs."""
    from sweep.sweepfile.schema import NAME
    from sweep.sweepfile.templates import QUESTIONS, text

    file = name if name.suffix == ".yaml" else name.with_name(f"{name.name}.yaml")
    if not re.fullmatch(NAME, file.stem) or len(file.stem) > MOST_CHARACTERS:
        raise UserError(
            f"{file.stem!r}: a sweep's name is lower-case letters, digits, dots and hyphens, "
            f"{MOST_CHARACTERS} at most"
        )
    chosen = template or (file.stem if file.stem in QUESTIONS else "modality")
    if chosen not in QUESTIONS:
        close = difflib.get_close_matches(chosen, QUESTIONS, n=1)
        meant = f"; did you mean {close[0]!r}" if close else ""
        raise UserError(f"no template is called {chosen!r}{meant}; allowed: {', '.join(QUESTIONS)}")
    content = text(chosen, file.stem)
    with writing(file):
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(content)
        except FileExistsError:
            raise UserError(f"{file}: is there already; choose another name") from None
    echo(f"{file}: {QUESTIONS[chosen]}")
    note(f"next: sweep run {shlex.quote(str(file))}")


def _templates() -> list[str]:
    """Return the names that a shell completes."""
    from sweep.sweepfile.templates import QUESTIONS

    return list(QUESTIONS)


@app.command(epilog="Example: sweep validate experiments/quickstart.yaml")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Sweep files.")],
    code: Annotated[
        bool, typer.Option("--code", help="Also try out tasks and backbones of your own.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Check sweep files, and list every problem of each; with --quiet nothing else."""
    from sweep.sweepfile.expansion import load
    from sweep.sweepfile.schema import SweepFileError

    problems = 0
    for file in files:
        try:
            sweep = load(file)
        except SweepFileError as error:
            say(str(error))
            problems += len(error.problems)
        else:
            if not quiet:
                echo(f"{file}: {size(sweep)}")
                for left_out in sweep.left_out:
                    echo(f"  left out: {left_out}")
            for warning in sweep.warnings:
                say(f"warning: {warning}")
            for problem in _problems_of_code(sweep) if code else ():
                say(f"{file}: {problem}")
                problems += 1
    if problems:
        say(f"{count(problems, 'problem')}.")
        raise typer.Exit(2)


def _problems_of_code(sweep: Sweep) -> Iterable[str]:
    """Try out each task and backbone of the user's own once; yield what is wrong with it, and say
    what is doubtful.
    """
    from fpt import contract
    from fpt.files import DataError

    told: set[str] = set()
    for point in sweep.all:
        try:
            for doubt in contract.check_trial(point.config, other_process=True):
                say(f"warning: {doubt}")
        except DataError as error:
            if str(error) not in told:
                told.add(str(error))
                yield str(error)


@app.command(epilog="Example: sweep plan experiments/quickstart.yaml")
def plan(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Sweep files.")],
    only: Only = None,
    results: Results = "results",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run would do: what is done, missing, blocked, failed or stale.

    Of several files it says what each would cost, and what all would, one after another, with
    trials that they share counted once. With --quiet the trials are not listed.
    """
    from sweep.ledger.ledger import Ledger
    from sweep.planning.plan import plan as make_plan

    ledger = Ledger(results)
    plans = [make_plan(file, ledger, only=only or ()) for file in files]
    if as_json:
        records = [_record(planned, ledger) for planned in plans]
        show_json(records[0] if len(plans) == 1 else _in_all(plans, records, ledger))
    elif len(plans) == 1:
        _show(plans[0], ledger, listed=0 if quiet else LISTED)
    else:
        _show_several(plans, ledger)
    for planned in () if as_json else plans:
        _warn(planned)


def _record(planned: Plan, ledger: Ledger) -> JSON:
    from sweep.analysis.foresight import foresee
    from sweep.planning.estimates import quote

    claims = [one.record() for one in foresee(planned.sweep, ledger)]
    return planned.to_json() | {"quote": quote(planned, ledger).to_json(), "claims": claims}


def _in_all(plans: Sequence[Plan], records: Sequence[JSON], ledger: Ledger) -> JSON:
    """Return the record of several files, and of all of them together."""
    counts, shared, price = _together(plans, ledger)
    total = {"trials": counts.total(), "shared": shared, "counts": dict(counts)}
    return {"files": list(records), "total": total | {"quote": price.to_json()}}


def _together(plans: Sequence[Plan], ledger: Ledger) -> tuple[Counter[str], int, Quote]:
    """Return the trials of several files by status, how often one is in a further file, and the
    price of all.
    """
    from sweep.planning.estimates import quote
    from sweep.planning.plan import in_turn

    first, *others = in_turn(plans)
    counts: Counter[str] = Counter()
    for one in (first, *others):
        counts.update(one.counts())
    shared = sum(len(one.status) for one in plans) - counts.total()
    return counts, shared, quote(first, ledger, *others)


def _show_several(plans: Sequence[Plan], ledger: Ledger) -> None:
    """Print a line a file, and what they come to together."""
    from sweep.planning.estimates import quote

    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("file", "trials", "price"):
        grid.add_column(column, overflow="fold")
    for one in plans:
        cost = _hours(quote(one, ledger)) if one.packs else ""
        grid.add_row(escape(str(one.sweep.file)), counted(one.counts()), cost)
    SafeConsole().print(grid)
    for one in plans:
        for left_out in one.sweep.left_out:
            echo(f"  left out of {one.sweep.file}: {left_out}")
    counts, shared, price = _together(plans, ledger)
    again = f" (and {shared:,} again, which are counted once)" if shared else ""
    echo(f"{count(len(plans), 'file')}: {count(counts.total(), 'trial')}{again}: {counted(counts)}")
    if any(one.packs for one in plans):
        for line in _price(price):
            echo(line)


def _show(planned: Plan, ledger: Ledger, *, listed: int) -> None:
    """Print the plan of a file, and at most so many of its trials."""
    from sweep.analysis.foresight import foresee
    from sweep.planning.estimates import quote
    from sweep.planning.tuning import notes

    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("trial", "status", "label", "why"):
        grid.add_column(column, overflow="fold")
    points = planned.sweep.all
    for point in points[:listed]:
        status, why = planned.status[point.trial_id], planned.why.get(point.trial_id, "")
        grid.add_row(point.trial_id, status, escape(point.label), escape(why))
    if listed:
        SafeConsole().print(grid)
    if len(points) > listed > 0:
        echo(f"... and {len(points) - LISTED:,} more (--json lists all)")
    echo(f"{planned.sweep.name}: {size(planned.sweep)}: {counted(planned.counts())}")
    for line in _packs(planned):
        echo(line)
    if planned.packs:
        for line in _price(quote(planned, ledger)):
            echo(line)
    for line in _findable(foresee(planned.sweep, ledger)):
        echo(line)
    for line in notes(planned.sweep):
        echo(f"  {line}")
    for left_out in planned.sweep.left_out:
        echo(f"  left out: {left_out}")


def _warn(planned: Plan) -> None:
    """Say what a run of a plan would be stopped by, or asked for."""
    for problem in planned.refusals:
        say(f"not on this machine without a GPU: {problem}")
    if planned.unpinned:
        say(f"of no commit in particular: {', '.join(planned.unpinned)}")
        file = shlex.quote(str(planned.sweep.file))
        say(f"`sweep fetch {file}` pins them; a run asks for it")
    for warning in planned.sweep.warnings:
        say(f"warning: {warning}")


def _price(price: Quote) -> Iterable[str]:
    """Return what it will cost, with what that rests on."""
    from sweep.cli.progress import span

    memory = f"{price.memory / 1e9:.1f} GB a worker, " if price.memory else ""
    if price.hours is None:
        yield f"  price: {_hours(price)} ({price.note})"
    else:
        ends = f", done in {span(3600 * price.finish_hours)}" if price.finish_hours else ""
        yield f"  price: {_hours(price)}{ends}; estimated: {price.note}"
    yield f"  memory and disk, by formula: {memory}{price.disk / 1e6:,.1f} MB in the ledger"


def _hours(price: Quote) -> str:
    """Return what it will cost, in hours with their interval, or in operations."""
    if price.hours is None or price.low is None or price.high is None:
        return f"{price.operations:.2g} operations by formula"
    what = "GPU" if price.device == "cuda" else "core"
    return (
        f"about {in_hours(price.hours)} {what}-hours "
        f"({in_hours(price.low)} to {in_hours(price.high)} in nine of ten)"
    )


def _findable(foreseen: Sequence[Foresight]) -> Iterable[str]:
    """Return what the claims can find."""
    from sweep.cli.progress import span

    known = [one for one in foreseen if one.smallest is not None]
    if foreseen and not known:
        yield "claims: what they can find is not known: the ledger has no cells of three seeds yet"
    if known:
        yield "claims: the smallest difference found with a chance of 0.8, if outcomes are normal"
    for one in known[:LISTED]:
        where = ": ".join(filter(None, (" / ".join(one.place.values()), one.claim)))
        seeds = [
            f"{points}: {'over 1,000' if number is None else f'{number:,}'}"
            for points, number in one.seeds.items()
        ]
        counted = f"; points found by seeds: {', '.join(seeds)}" if seeds else ""
        cost = f", {span(one.seconds)} a seed" if one.seconds else ""
        yield (
            f"  {where}: {one.smallest:.2g} with {one.pairs} seeds (spread of {one.known_by}: "
            f"{one.spread:.2g}){counted}{cost}"
        )


def _packs(planned: Plan) -> Iterable[str]:
    """Return what trains side by side, and what that saves."""
    if not planned.packs:
        return
    from sweep.planning.packing import sizes

    of = [
        f"{number:,} alone" if members == 1 else f"{number:,} of {members}"
        for members, number in sizes(pack.points for pack in planned.packs).items()
    ]
    trials = sum(len(pack.points) for pack in planned.packs)
    yield (
        f"to run: {count(trials, 'trial')} in {count(len(planned.packs), 'pack')} "
        f"({', '.join(of)}), on this machine {planned.workers.count} at a time, a core each"
    )
    if any(pack.points[1:] for pack in planned.packs):
        yield f"  packs save about {planned.saving:.0%} of the time in training (estimated)"
    if planned.apart:
        yield f"  {count(planned.apart, 'trial')} alone, measured to be no quicker in packs"
    if planned.inexact:
        yield (
            f"  {count(planned.inexact, 'trial')} alone, since in packs they would have other bits "
            "on the processors that trained such trials (row_padding 0 in their rows)"
        )
    for why, number in planned.alone.items():
        yield f"  {count(number, 'trial')} alone: {why}"
    if planned.seeds_apart:
        yield (
            f"  {count(planned.seeds_apart, 'trial')} alone, since each seed draws a backbone of "
            "its own; a fixed backbone_seed would let seeds share packs, and leave the draw out of "
            "a table's intervals"
        )


@app.command(epilog="Example: sweep fetch experiments/paper/t2.yaml")
def fetch(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Sweep files.")],
    update: Annotated[
        bool, typer.Option("--update", help="Find the newest commits, whatever the lock says.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Bring models and data here ahead of a run, checked, and pin their commits in FILE's lock."""
    from fpt.hub import cache
    from sweep.sweepfile.fetching import fetch as bring
    from sweep.sweepfile.fetching import megabytes

    summary = bring(files, update=update, console=SafeConsole(stderr=True), quiet=quiet)
    parts = [f"{count(summary.good, 'source')} here"]
    parts += [f"{count(summary.bad, 'problem')}"] if summary.bad else []
    if summary.size:
        new = megabytes(summary.downloaded)
        parts.append(f"{megabytes(summary.size)} of the Hub's in {cache()}, {new} of them new")
    (say if summary.bad else note)("; ".join(parts))
    raise typer.Exit(summary.exit_code)


@app.command(epilog="Example: sweep schema > sweep-file.schema.json")
def schema(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A sweep file whose own classes to include."),
    ] = None,
) -> None:
    """Print the JSON Schema of sweep files, for editors that complete and check."""
    from sweep.sweepfile.expansion import find_modules
    from sweep.sweepfile.json_schema import json_schema
    from sweep.sweepfile.reading import load

    spec = None if file is None else load(file)
    if spec is not None:
        find_modules(spec)
    show_json(json_schema(spec))
