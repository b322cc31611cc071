"""Commands before a run: about sweep files, and what they need."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table as Grid

from sweep.cli.common import (
    AsJson,
    File,
    Only,
    Results,
    SafeConsole,
    UserError,
    app,
    count,
    counted,
    echo,
    in_hours,
    say,
    show_json,
    size,
    writing,
)

if TYPE_CHECKING:
    from sweep.analysis.foresight import Foresight
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
    say(f"next: sweep run {shlex.quote(str(file))}")


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
) -> None:
    """Check sweep files, and list every problem of each."""
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
    file: File, only: Only = None, results: Results = "results", as_json: AsJson = False
) -> None:
    """Say what a run would do: what is done, missing, blocked, failed or stale."""
    from sweep.analysis.foresight import foresee
    from sweep.ledger.ledger import Ledger
    from sweep.planning.estimates import quote
    from sweep.planning.plan import plan as make_plan
    from sweep.planning.tuning import notes

    planned = make_plan(file, results, only=only or ())
    foreseen = foresee(planned.sweep, Ledger(results))
    if as_json:
        price = quote(planned, Ledger(results)).to_json()
        claims = [one.record() for one in foreseen]
        show_json(planned.to_json() | {"quote": price, "claims": claims})
        return
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("trial", "status", "label", "why"):
        grid.add_column(column, overflow="fold")
    points = planned.sweep.all
    for point in points[:LISTED]:
        status, why = planned.status[point.trial_id], planned.why.get(point.trial_id, "")
        grid.add_row(point.trial_id, status, escape(point.label), escape(why))
    SafeConsole().print(grid)
    if len(points) > LISTED:
        echo(f"... and {len(points) - LISTED:,} more (--json lists all)")
    echo(f"{planned.sweep.name}: {size(planned.sweep)}: {counted(planned.counts())}")
    for line in _packs(planned):
        echo(line)
    if planned.packs:
        for line in _price(quote(planned, Ledger(results))):
            echo(line)
    for line in _findable(foreseen):
        echo(line)
    for note in notes(planned.sweep):
        echo(f"  {note}")
    for problem in planned.refusals:
        say(f"not on this machine without a GPU: {problem}")
    if planned.unpinned:
        say(f"of no commit in particular: {', '.join(planned.unpinned)}")
        say(f"`sweep fetch {shlex.quote(str(file))}` pins them; a run asks for it")
    for left_out in planned.sweep.left_out:
        echo(f"  left out: {left_out}")
    for warning in planned.sweep.warnings:
        say(f"warning: {warning}")


def _price(price: Quote) -> Iterable[str]:
    """Return what it will cost, with what that rests on."""
    from sweep.cli.progress import span

    what = "GPU" if price.device == "cuda" else "core"
    memory = f"{price.memory / 1e9:.1f} GB a worker, " if price.memory else ""
    if price.hours is None or price.low is None or price.high is None:
        yield f"  price: {price.operations:.2g} operations by formula ({price.note})"
    else:
        ends = f", done in {span(3600 * price.finish_hours)}" if price.finish_hours else ""
        yield (
            f"  price: about {in_hours(price.hours)} {what}-hours "
            f"({in_hours(price.low)} to {in_hours(price.high)} in nine of ten){ends}; estimated: "
            f"{price.note}"
        )
    yield f"  memory and disk, by formula: {memory}{price.disk / 1e6:,.1f} MB in the ledger"


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
) -> None:
    """Bring models and data here ahead of a run, checked, and pin their commits in FILE's lock."""
    from fpt.hub import cache
    from sweep.sweepfile.fetching import fetch as bring
    from sweep.sweepfile.fetching import megabytes

    summary = bring(files, update=update, console=SafeConsole(stderr=True))
    parts = [f"{count(summary.good, 'source')} here"]
    parts += [f"{count(summary.bad, 'problem')}"] if summary.bad else []
    if summary.size:
        new = megabytes(summary.downloaded)
        parts.append(f"{megabytes(summary.size)} of the Hub's in {cache()}, {new} of them new")
    say("; ".join(parts))
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
