"""What the commands share: the app, arguments that many of them take, words for people."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer
from rich.console import Console

from fpt.printable import printable

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment

    from sweep.ledger.ledger import Ledger
    from sweep.sweepfile.trials import Sweep

F = TypeVar("F", bound=StrEnum)

LINES = "\n\t"
"""Unprintable characters of a text of several lines that stay."""

app = typer.Typer(
    name="sweep",
    epilog="Begin with: sweep init quickstart, then sweep run quickstart.yaml",
    no_args_is_help=True,
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
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="PATTERN",
        help="A label, a glob over labels or a trial id; may be repeated. What these trials need "
        "comes along.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]

_hushed: list[bool] = []
# Holds something while a command runs that was called with --quiet.


@contextmanager
def _quietly() -> Iterator[None]:
    _hushed.append(True)
    try:
        yield
    finally:
        _hushed.pop()


def _hush(context: typer.Context, asked: bool) -> bool:
    if asked:
        context.with_resource(_quietly())
    return asked


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_hush, help="Print results, warnings and failures alone."
    ),
]
"""Of every command that has notes (`note`); few need to look at its value."""


def _print_version(asked: bool) -> None:
    if asked:
        import sweep

        typer.echo(f"fpt-sweep {sweep.__version__}")
        raise typer.Exit


_stdout: list[TextIO] = []
# Where results go, while a command runs.


def stdout() -> TextIO:
    """Return where results go. While a command runs, `sys.stdout` is stderr: what a class of the
    user's prints is no part of what a program reads.
    """
    return _stdout[-1] if _stdout else sys.stdout


@contextmanager
def _results_alone() -> Iterator[None]:
    _stdout.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.pop()


@app.callback()
def sweep_command(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Ablation sweeps for frozen pretrained transformers."""
    if "--help" not in sys.argv:  # A command's help is a result.
        context.with_resource(_results_alone())


class UserError(Exception):
    """An argument that this command line cannot follow; the message says what it could."""


def say(text: str) -> None:
    """Tell people something, on stderr."""
    typer.echo(printable(text, keep=LINES), err=True)


def note(text: str) -> None:
    """Tell people what was done or what they may do next, on stderr; --quiet leaves it out."""
    if not _hushed:
        say(text)


def echo(text: str = "") -> None:
    """Print a result, on stdout."""
    typer.echo(printable(text, keep=LINES), file=stdout())


class SafeConsole(Console):
    """A console of rich's whose texts are no commands to the terminal: labels may come from
    anywhere.
    """

    def __init__(self, *, file: IO[str] | None = None, stderr: bool = False, **how: Any) -> None:
        """Make one for results, or for stderr; arguments as of rich's."""
        super().__init__(file=file if file or stderr else stdout(), stderr=stderr, **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, with unprintable characters as escapes."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text, keep=LINES))


def in_json(value: Any) -> str:
    """JSON as every command writes it."""
    return json.dumps(value, indent=2, default=str)


def show_json(value: Any) -> None:
    """Print JSON on stdout."""
    echo(in_json(value))


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Around what writes to `--output`: where it cannot, the user is told so in a line."""
    from sweep.ledger.errors import unwritable

    try:
        yield
    except OSError as error:
        raise UserError(unwritable(output, error)) from error


TEXT = ("", ".txt")
"""Suffixes of files that hold what a terminal would show."""

TELLING = {
    ".csv", ".docx", ".feather", ".htm", ".html", ".jpg", ".json", ".md", ".parquet", ".pdf",
    ".png", ".svg", ".tex", ".tsv", ".xlsx", ".zip",
}  # fmt: skip
"""Suffixes that say what is in a file, to whoever opens it."""


def chosen_format(form: F | None, output: Path | None, formats: Collection[F], text: F) -> F:
    """Return the format to write: as asked for, or as the suffix of `--output` says.

    Args:
        form: What `--format` says, if it was given.
        output: The file, or None for stdout.
        formats: The formats that have a suffix of their own name.
        text: The format of a terminal, and of a file without a suffix.

    Raises:
        UserError: If the two contradict each other, or the suffix says nothing.
    """
    if output is None:
        return form or text
    suffix = output.suffix.lower()
    of = {f".{one}": one for one in formats} | dict.fromkeys(TEXT, text)
    if form is None and suffix in of:
        return of[suffix]
    if form is None or (suffix in TELLING and of.get(suffix) is not form):
        allowed = ", ".join(f".{one}" for one in formats)
        asked = f"--format {form} contradicts" if form else "no format goes by"
        raise UserError(
            f"--output {output}: {asked} its suffix {suffix}; suffixes are {allowed}, and any "
            "other name takes --format"
        )
    return form


def count(number: int, noun: str) -> str:
    """Return a number and its noun: 1 trial, 2 trials."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def counted(counts: Mapping[str, int]) -> str:
    """Return the counts that are not zero: 12 done, 3 missing."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "nothing"


def size(sweep: Sweep) -> str:
    """Return how many trials a sweep has."""
    kept = f" and {count(len(sweep.pretrainings), 'pretraining')}" if sweep.pretrainings else ""
    tuned = f", after {count(len(sweep.tunings), 'trial')} that tune them" if sweep.studies else ""
    return count(len(sweep.points), "trial") + kept + tuned


def in_hours(number: float) -> str:
    """Hours to two digits: 0.014, 2.3, 140."""
    return f"{float(f'{number:.2g}'):,g}"


def where_option(results: str) -> str:
    """Return the option that names the ledger, where it is not the default one."""
    return "" if results == "results" else f" --results {shlex.quote(results)}"


def last_causes(ledger: Ledger) -> dict[str, str]:
    """Return why the last attempt failed, of each trial that is not done and was not forgiven."""
    done = ledger.done()
    last = ledger.last_failures()
    return {trial: row["cause"] for trial, row in last.items() if trial not in done}


def reading(results: str) -> Ledger:
    """Open a ledger to read. A place that was named must be one; the default may yet come.

    Raises:
        sweep.ledger.ledger.LedgerError: If it is none.
    """
    from sweep.ledger.ledger import Ledger

    return Ledger(results) if results == "results" else Ledger.existing(results)


def whole_id(prefix: str, known: Iterable[str], where: str) -> str:
    """Return the one known id that begins so."""
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


def figures(loss: float | None, accuracy: float | None, metrics: Mapping[str, float | None]) -> str:
    """Return the figures of a record in a line: `loss 0.6931 accuracy 0.5000`."""
    found = {"loss": loss, "accuracy": accuracy, **metrics}
    return " ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)
