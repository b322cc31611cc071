"""The command `sweep`. Results go to stdout, everything else to stderr.

Exit codes: 0, every trial is done (a diverged one is done); 1, some are not; 2, the input was
wrong and nothing was started. A user's mistake is a message; a traceback is a bug of ours. Modules
that cost seconds to import (Ray, torch, MLflow) are imported by the commands that use them, so that
validate, plan, status and table answer at once. No option overrides a field of a trial: another
experiment is another file.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

if TYPE_CHECKING:
    from sweep.ledger import Kind, Ledger
    from sweep.planning import Plan
    from sweep.trials import Point, Sweep

LISTED = 100
"""Trials that `plan` lists for people; `--json` lists all."""
TAIL = 12
"""Records of a curve that `show` prints."""

app = typer.Typer(
    name="sweep",
    epilog="Begin with: sweep run experiments/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    # A mistake of the user's is told by `main`; what is left is a bug, shown as Python shows it.
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file.")]
Results = Annotated[
    str,
    typer.Option(
        "--results",
        metavar="URI",
        envvar="FPT_SWEEP_RESULTS",
        help="The ledger: a folder, s3://, gs:// or az://.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


class Format(StrEnum):
    """What `sweep table` writes."""

    terminal = "terminal"
    md = "md"
    tex = "tex"
    html = "html"
    csv = "csv"


def _print_version(asked: bool) -> None:
    if asked:
        import sweep

        typer.echo(f"fpt-sweep {sweep.__version__}")
        raise typer.Exit


@app.callback()
def sweep_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Ablation sweeps for frozen pretrained transformers."""


def main() -> None:
    """Run the command line."""
    try:
        app()
    except Exception as error:
        if not isinstance(error, _mistakes()):
            raise
        say(str(error))
        sys.exit(2)


def _mistakes() -> tuple[type[Exception], ...]:
    """What a user, a disk or a missing data set did, as opposed to a bug of ours."""
    from fpt.content import DataError
    from sweep.driver import ClusterError
    from sweep.ledger import LedgerError
    from sweep.schema import SweepFileError
    from sweep.tracking import MirrorError

    return ClusterError, DataError, LedgerError, MirrorError, SweepFileError, UserError


class UserError(Exception):
    """An argument that this command line cannot follow; the message says what it could."""


def say(text: str) -> None:
    """Tell people something, on stderr."""
    typer.echo(text, err=True)


def show_json(value: Any) -> None:
    """Print JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 trial, 2 trials."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def counted(counts: Mapping[str, int]) -> str:
    """The counts that are not zero: 12 done, 3 missing."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "nothing"


# ------------------------------------------------------------------------------------ before a run


@app.command(epilog="Example: sweep validate experiments/quickstart.yaml")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Sweep files.")],
) -> None:
    """Check sweep files, and tell every problem of each."""
    from sweep.schema import SweepFileError
    from sweep.trials import load

    problems = 0
    for file in files:
        try:
            sweep = load(file)
        except SweepFileError as error:
            say(str(error))
            problems += len(error.problems)
        else:
            typer.echo(f"{file}: {_size(sweep)}")
            for left_out in sweep.left_out:
                typer.echo(f"  left out: {left_out}")
    if problems:
        say(f"{count(problems, 'problem')}.")
        raise typer.Exit(2)


def _size(sweep: Sweep) -> str:
    kept = f" and {count(len(sweep.pretrainings), 'pretraining')}" if sweep.pretrainings else ""
    return count(len(sweep.points), "trial") + kept


@app.command(epilog="Example: sweep plan experiments/quickstart.yaml")
def plan(file: File, results: Results = "results", as_json: AsJson = False) -> None:
    """Say what a run would do: what is done, missing, blocked, failed or stale."""
    from sweep.planning import plan as make_plan

    planned = make_plan(file, results)
    if as_json:
        show_json(planned.to_json())
        return
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("trial", "status", "label", "why"):
        grid.add_column(column, overflow="fold")
    points = planned.sweep.all
    for point in points[:LISTED]:
        status, why = planned.status[point.trial_id], planned.why.get(point.trial_id, "")
        grid.add_row(point.trial_id, status, escape(point.label), escape(why))
    Console().print(grid)
    if len(points) > LISTED:
        typer.echo(f"... and {len(points) - LISTED:,} more (--json lists all)")
    typer.echo(f"{planned.sweep.name}: {_size(planned.sweep)}: {counted(planned.counts())}")
    for line in _packs(planned):
        typer.echo(line)
    for problem in planned.refusals:
        say(f"not on this machine without a GPU: {problem}")
    if planned.unpinned:
        say(f"of no commit in particular: {', '.join(planned.unpinned)}")
        say(f"`sweep fetch {shlex.quote(str(file))}` pins them; a run asks for it")
    for left_out in planned.sweep.left_out:
        typer.echo(f"  left out: {left_out}")


def _packs(planned: Plan) -> Iterable[str]:
    """What trains side by side, and what that saves."""
    if not planned.packs:
        return
    from sweep.packing import sizes

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
    from sweep.fetching import fetch as bring
    from sweep.fetching import megabytes

    summary = bring(files, update=update, console=Console(stderr=True))
    parts = [f"{count(summary.good, 'source')} here"]
    parts += [f"{count(summary.bad, 'problem')}"] if summary.bad else []
    if summary.size:
        new = megabytes(summary.downloaded)
        parts.append(f"{megabytes(summary.size)} of the Hub's in {cache()}, {new} of them new")
    say("; ".join(parts))
    raise typer.Exit(summary.exit_code)


@app.command(epilog="Example: sweep schema > sweep.schema.json")
def schema() -> None:
    """Print the JSON Schema of sweep files, for editors that complete and check."""
    from sweep.schema import json_schema

    show_json(json_schema())


# ------------------------------------------------------------------------------------------ a run


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
    say(f"{sweep.name}: {_size(sweep)}: {counted(planned.counts())}")
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
    where = _where(results)
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


def _where(results: str) -> str:
    return "" if results == "results" else f" --results {shlex.quote(results)}"


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
        last = _last_causes(ledger)
        failed = [p for p in failed if last.get(p.trial_id) in cause]
    ledger.forgive([p.trial_id for p in failed])
    for point in failed:
        typer.echo(f"{point.trial_id} {point.label}")
    if failed:
        again = shlex.quote(str(file)) + _where(results)
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
    found = _matching(sweep, pattern)
    if len(found) > 1:
        say(f"{count(len(found), 'trial')} match {pattern!r}; the first one is trained")
    return found[0]


def _matching(sweep: Sweep, pattern: str) -> list[Point]:
    """The trials whose label or id matches, at least one."""
    from fnmatch import fnmatchcase

    found = [
        p
        for p in sweep.all
        if fnmatchcase(p.label, pattern) or (len(pattern) >= 4 and p.trial_id.startswith(pattern))
    ]
    if not found:
        raise UserError(
            f"{sweep.file}: no trial matches {pattern!r}; labels look like "
            f"{', '.join(repr(p.label) for p in sweep.all[:3])}"
        )
    return found


# ------------------------------------------------------------------------------------ after a run


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
        said["failures"] = Counter(_last_causes(ledger).values())
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


@app.command(epilog="Example: sweep table experiments/quickstart.yaml --format md -o table.md")
def table(
    file: File,
    form: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.terminal,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="A file to write it to.")
    ] = None,
    results: Results = "results",
    as_json: AsJson = False,
) -> None:
    """Print the sweep's table, with what there is so far."""
    from sweep.ledger import Ledger
    from sweep.tables import build
    from sweep.trials import load

    built = build(load(file), Ledger(results))
    if as_json:
        text = json.dumps(built.to_json(), indent=2, default=str)
    elif form is Format.terminal and output is None:
        Console().print(built.to_rich())
        return
    else:
        text = {
            Format.terminal: built.to_markdown,
            Format.md: built.to_markdown,
            Format.tex: built.to_latex,
            Format.html: built.to_html,
            Format.csv: built.to_csv,
        }[form]()
    if output is None:
        typer.echo(text.rstrip("\n"))
        return
    try:
        output.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    say(f"{output}: written")


@app.command(epilog="Example: sweep attention experiments/quickstart.yaml -o figures")
def attention(
    file: File,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A folder for the figures.")
    ],
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="A label, glob or trial id.")
    ] = None,
    results: Results = "results",
) -> None:
    """Draw the attention maps of finished trials on the bit tasks: PDF, SVG and PNG each."""
    from fpt.content import DataError
    from sweep.figures import draw_attention
    from sweep.ledger import Ledger
    from sweep.trials import load

    sweep, ledger = load(file), Ledger(results)
    if ledger.local is None:
        raise UserError(
            f"{ledger.uri}: trained tensors are read from a folder; copy trials/, states/ and "
            "backbones/ to one, and name it with --results"
        )
    points = _matching(sweep, only) if only else sweep.all
    drawable, lacking, never = _drawable(points, ledger, file)
    drawn = 0
    for point in drawable:
        try:
            files = draw_attention(point, ledger.local, output)
        except DataError as error:
            lacking.append(f"{point.label}: {error}")
        except ValueError as error:
            never[str(error)] += 1
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror})") from error
        else:
            typer.echo("\n".join(map(str, files)))
            drawn += 1
    for text in (*(f"{count(n, 'trial')}: {why}" for why, n in never.items()), *lacking):
        say(f"not drawn: {text}")
    if not drawn:
        raise UserError(f"{file}: no trial could be drawn")
    if lacking:
        raise typer.Exit(1)


def _drawable(
    points: Iterable[Point], ledger: Ledger, file: Path
) -> tuple[list[Point], list[str], Counter[str]]:
    """The trials whose maps can be drawn; those that miss something; why others never can be."""
    from sweep.figures import undrawable

    done, kept = ledger.done(), ledger.states()
    drawable: list[Point] = []
    lacking: list[str] = []
    never: Counter[str] = Counter()
    for point in points:
        name = point.trial_id
        if why := undrawable(point.config):
            never[why] += 1
        elif name not in done:
            lacking.append(f"{point.label}: trial {name} is not finished; sweep run {file}")
        elif name not in kept:
            lacking.append(
                f"{point.label}: the trained tensors of {name} were not kept; write `keep: "
                f"{{trained: true}}` into {file}, delete {ledger.uri}/trials/{name}.parquet, and "
                f"train it again: sweep run {file}"
            )
        else:
            drawable.append(point)
    return drawable, lacking, never


@app.command(epilog="Example: sweep weights experiments/quickstart.yaml")
def weights(file: File, results: Results = "results", as_json: AsJson = False) -> None:
    """Say what the backbones of a sweep are before training: statistics by layer, counts by group.

    A drawn backbone is the draw of the first trial that has it.
    """
    from fpt.content import DataError
    from sweep.ledger import Ledger, LedgerError
    from sweep.trials import load

    ledger = Ledger(results)
    backbones: dict[object, list[Point]] = {}
    for point in load(file).all:
        config = point.config
        backbones.setdefault((config.backbone, config.pretraining), []).append(point)
    told: list[dict[str, Any]] = []
    absent = 0
    for points in backbones.values():
        try:
            told.append(_weights_of(points, ledger))
        except (DataError, LedgerError) as error:
            say(f"{points[0].label}: {error}")
            absent += 1
    if as_json:
        show_json(told)
    else:
        for one in told:
            _show_weights(one)
    if absent:
        raise typer.Exit(1 if told else 2)


def _weights_of(points: Sequence[Point], ledger: Ledger) -> dict[str, Any]:
    """What `weights` says of the trials of one backbone."""
    from dataclasses import asdict

    from fpt.backbones.statistics import statistics
    from fpt.groups import PREFIX, counts, trained
    from fpt.model import build_model

    point = points[0]
    config, parent = point.config, point.parent
    files = {} if parent is None else {parent: ledger.backbone_file(parent)}
    model = build_model([config], backbones=files)
    parameters = model.member(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in parameters.items()
        if name.startswith(PREFIX)
    }
    groups = {name: model.groups[PREFIX + name] for name in own}
    rows = statistics(own, groups, config.backbone.row.layer)
    sets = dict.fromkeys(one.config.train for one in points)
    return {
        "backbone": config.backbone.model_dump(mode="json"),
        "pretraining": config.pretraining,
        "trial": point.trial_id,
        "label": point.label,
        "trials": len(points),
        "digest": model.backbone_digest,
        "statistics": [asdict(row) for row in rows],
        "parameters": [
            {
                "train": list(train),
                "groups": counts(
                    model.groups, shapes, trained(model.groups, train, config.backbone)
                ),
            }
            for train in sets
        ],
    }


def _show_weights(told: Mapping[str, Any]) -> None:
    # A terminal that is narrower breaks the lines; a figure that is cut says nothing.
    console = Console(width=max(Console().width, 110))
    backbone = told["backbone"]
    layers, heads = count(backbone["layers"], "layer"), count(backbone["heads"], "head")
    size = f"{layers} of {backbone['width']}, {heads}"
    same = f", as in {count(told['trials'], 'trial')}" if told["trials"] > 1 else ""
    title = f"{backbone['name']} ({size}), {told['pretraining']}: trial {told['trial']}{same}"
    console.print(title, style="bold", markup=False, highlight=False)
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("layer", "group", "kind"):
        grid.add_column(column)
    for column in ("tensors", "number", "mean", "deviation", "minimum", "maximum"):
        grid.add_column(column, justify="right")
    for row in told["statistics"]:
        figures = (row[name] for name in ("mean", "deviation", "minimum", "maximum"))
        grid.add_row(
            "" if row["layer"] is None else str(row["layer"] + 1),
            row["group"],
            row["kind"],
            str(row["tensors"]),
            f"{row['number']:,}",
            *(f"{figure:.4g}" for figure in figures),
        )
    console.print(grid)
    for one in told["parameters"]:
        trained = sum(group["trained"] for group in one["groups"].values())
        total = sum(group["parameters"] for group in one["groups"].values())
        part = f"{trained:,} of {total:,} parameters train ({trained / total:.3%})"
        console.print(f"\n{' + '.join(one['train'])}: {part}", markup=False, highlight=False)
        grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("group")
        for column in ("tensors", "parameters", "trained", "frozen"):
            grid.add_column(column, justify="right")
        for name, group in one["groups"].items():
            frozen = group["parameters"] - group["trained"]
            numbers = (group["tensors"], group["parameters"], group["trained"], frozen)
            grid.add_row(name, *(f"{number:,}" for number in numbers))
        console.print(grid)
    console.print()


@app.command(epilog="Example: sweep show 3f9a")
def show(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial id, or how it begins.")],
    results: Results = "results",
) -> None:
    """Show a trial: config, figures, the end of its curve, provenance, failures."""
    from sweep.ledger import Ledger

    ledger = Ledger(results)
    # A mark that a trial may run again is a row among the failures, and none to show.
    failures = [row for row in ledger.failures().to_pylist() if row["cause"] != "retried"]
    known = ledger.done() | ledger.states() | {row["trial_id"] for row in failures}
    trial = _whole_id(trial, known, ledger.uri)
    failures = [row for row in failures if row["trial_id"] == trial]
    rows = ledger.trials([trial]).to_pylist()
    typer.echo(f"trial {trial}: {rows[0]['outcome'] if rows else 'not done'}")
    configs = [row["config"] for row in (*rows, *failures) if row["config"]]
    if configs:
        typer.echo("\nconfig")
        typer.echo(json.dumps(json.loads(configs[0]), indent=2))
    if rows:
        typer.echo("\nresult")
        # The columns before `outcome` are the config, flat; then come figures and provenance.
        for name in list(rows[0])[list(rows[0]).index("outcome") :]:
            if rows[0][name] is not None:
                typer.echo(f"  {name:<20} {rows[0][name]}")
    _show_curve(ledger, trial)
    for row in failures:
        typer.echo(f"\nfailed {row['at']} on {row['host']}, cause: {row['cause']}")
        typer.echo((row["traceback"] or row["message"] or "").rstrip())


def _show_curve(ledger: Ledger, trial: str) -> None:
    records = sorted(ledger.curves([trial]).to_pylist(), key=lambda r: (r["step"], r["split"]))
    if not records:
        return
    typer.echo(f"\ncurve, the last {min(TAIL, len(records))} of {count(len(records), 'record')}")
    for record in records[-TAIL:]:
        typer.echo(
            f"  step {record['step']:>7} {record['split']:<10} loss {record['loss']:.4f} "
            f"accuracy {record['accuracy']:.4f}"
        )


def _last_causes(ledger: Ledger) -> dict[str, str]:
    """Why the last attempt failed, of each trial that is not done and was not forgiven."""
    rows = ledger.failures().sort_by("at").select(["trial_id", "cause"]).to_pylist()
    last = {row["trial_id"]: row["cause"] for row in rows}
    done = ledger.done()
    return {trial: why for trial, why in last.items() if why != "retried" and trial not in done}


def _whole_id(prefix: str, known: Iterable[str], where: str) -> str:
    found = sorted(trial for trial in known if trial.startswith(prefix))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"{where}: no trial begins with {prefix!r}; `sweep plan FILE` lists the ids"
        )
    shown: Sequence[str] = found[:5]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise UserError(f"{where}: {prefix!r} begins {', '.join(shown)}{more}; give more of it")


@app.command(epilog="Example: sweep gc experiments/quickstart.yaml")
def gc(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Sweep files: only what their trials left."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    results: Results = "results",
) -> None:
    """Say what takes disk, and remove what nothing needs, after asking. Results always stay."""
    from sweep.driver import DRIVER
    from sweep.ledger import Ledger
    from sweep.planning import plan as make_plan

    ledger = Ledger(results)
    plans = [make_plan(file, ledger) for file in files or ()]
    for kind, (objects, size) in ledger.usage().items():
        typer.echo(f"{kind:<10} {count(objects, 'object'):>16} {size / 1e6:>12,.1f} MB")
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
        say("name sweep files to learn which states and backbones their trials no longer need")
    if ledger.holders(DRIVER):
        raise UserError(f"{ledger.uri}: a run is under way; nothing is removed until it has ended")
    for kind, ids, why in offers:
        objects = ledger.usage()[kind][0] if ids is None else len(ids)
        if not objects:
            continue
        question = f"Remove {count(objects, 'object')} of {kind}? ({why})"
        if not yes and not sys.stdin.isatty():
            say(f"{question} --yes does")
        elif yes or typer.confirm(question, err=True):
            say(f"{count(ledger.remove(kind, ids), 'object')} of {kind} removed")


@app.command(epilog="Example: sweep mirror experiments/quickstart.yaml --rebuild")
def mirror(
    file: File,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Delete the sweep's runs first, and make all anew.")
    ] = False,
    results: Results = "results",
) -> None:
    """Copy finished trials to MLflow: what a run left out, or everything."""
    from sweep import tracking
    from sweep.ledger import Ledger
    from sweep.trials import load

    sweep, ledger = load(file), Ledger(results)
    number = (tracking.rebuild if rebuild else tracking.catch_up)(sweep, ledger)
    say(f"{tracking.where(ledger)}: {count(number, 'trial')} mirrored")


@app.command(epilog="Example: sweep ui --port 5001")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 5000,
    results: Results = "results",
) -> None:
    """Serve the MLflow UI on this ledger's runs, on this machine alone. Ctrl-C ends it."""
    from sweep.ledger import Ledger
    from sweep.tracking import serve_ui

    serve_ui(Ledger(results), port, ready=typer.echo)
