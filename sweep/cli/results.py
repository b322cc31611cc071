"""Commands that read figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweep.cli.common import (
    TELLING,
    AsJson,
    F,
    File,
    Quiet,
    Results,
    SafeConsole,
    UserError,
    app,
    chosen_format,
    count,
    echo,
    figures,
    in_json,
    note,
    reading,
    say,
    whole_id,
    writing,
)

if TYPE_CHECKING:
    from sweep.ledger.ledger import Ledger

TAIL = 12
"""Records of a curve that `show` prints."""


class Format(StrEnum):
    """What `sweep table` writes."""

    terminal = "terminal"
    md = "md"
    tex = "tex"
    html = "html"
    csv = "csv"


class ClaimsFormat(StrEnum):
    """What `sweep claims` writes."""

    terminal = "terminal"
    md = "md"
    tex = "tex"
    csv = "csv"


Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="A file to write it to.")
]


@app.command(epilog="Example: sweep table experiments/quickstart.yaml --format md -o table.md")
def table(
    file: File,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="How to write it; default: as PATH is named, or text."),
    ] = None,
    output: Output = None,
    results: Results = "results",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print the sweep's table, with what there is so far."""
    from sweep.analysis.tables import build
    from sweep.sweepfile.expansion import load

    chosen = _chosen(form, output, Format, as_json=as_json)
    built = build(load(file), reading(results))
    if chosen is None:
        _write(in_json(built.to_json()), output)
    elif chosen is Format.terminal and output is None:
        SafeConsole().print(built.to_rich())
    else:
        forms: dict[Format, Callable[[], str]] = {
            Format.terminal: built.to_markdown,
            Format.md: built.to_markdown,
            Format.tex: built.to_latex,
            Format.html: built.to_html,
            Format.csv: built.to_csv,
        }
        _write(forms[chosen](), output)


@app.command(epilog="Example: sweep claims experiments/quickstart.yaml --format tex -o claims.tex")
def claims(
    file: File,
    form: Annotated[
        ClaimsFormat | None,
        typer.Option("--format", help="How to write them; default: as PATH is named, or text."),
    ] = None,
    output: Output = None,
    results: Results = "results",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge the sweep's claims, with what there is so far, and say what more would decide them."""
    from sweep.analysis.claims import show
    from sweep.sweepfile.expansion import load

    chosen = _chosen(form, output, ClaimsFormat, as_json=as_json)
    sweep = load(file)
    judged = show(sweep, reading(results))
    for warning in sweep.warnings:
        say(f"warning: {warning}")
    if chosen is None:
        _write(in_json(judged.record()), output)
    elif chosen is ClaimsFormat.terminal and output is None:
        SafeConsole().print(judged.to_rich())
    else:
        forms: dict[ClaimsFormat, Callable[[], str]] = {
            ClaimsFormat.terminal: judged.to_markdown,
            ClaimsFormat.md: judged.to_markdown,
            ClaimsFormat.tex: judged.to_latex,
            ClaimsFormat.csv: judged.to_csv,
        }
        _write(forms[chosen](), output)


def _chosen(form: F | None, output: Path | None, forms: type[F], *, as_json: bool) -> F | None:
    """Return the format to write; None: JSON."""
    if as_json or (form is None and output is not None and output.suffix.lower() == ".json"):
        if form is not None:
            raise UserError(f"--json contradicts --format {form}; give one of them")
        if output is not None and output.suffix.lower() in TELLING - {".json"}:
            raise UserError(f"--output {output}: --json contradicts its suffix; name it .json")
        return None
    text = forms("terminal")
    return chosen_format(form, output, [one for one in forms if one is not text], text)


def _write(text: str, output: Path | None) -> None:
    """To a file, or to stdout."""
    if output is None:
        echo(text.rstrip("\n"))
        return
    with writing(output):
        output.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    note(f"{output}: written")


@app.command(epilog="Example: sweep show 3f9a")
def show(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial id, or how it begins.")],
    results: Results = "results",
) -> None:
    """Show a trial: config, figures, the end of its curve, provenance, failures."""
    from sweep.ledger.causes import MARKS
    from sweep.ledger.ledger import Ledger

    ledger = Ledger.existing(results)
    # Marks (may run again, done twice) are rows among the failures, and none to show.
    notes = ledger.failures().to_pylist()
    known = ledger.done() | ledger.states()
    known |= {row["trial_id"] for row in notes if row["cause"] not in MARKS}
    known |= {row["trial_id"] for row in notes if row["cause"] == "forgotten"}
    trial = whole_id(trial, known, ledger.uri)
    notes = [row for row in notes if row["trial_id"] == trial]
    failures = [row for row in notes if row["cause"] not in MARKS]
    rows = ledger.trials([trial]).to_pylist()
    echo(f"trial {trial}: {rows[0]['outcome'] if rows else 'not done'}")
    configs = [row["config"] for row in (*rows, *failures) if row["config"]]
    if configs:
        echo("\nconfig")
        echo(json.dumps(json.loads(configs[0]), indent=2))
    if rows:
        echo("\nresult")
        # The columns before `outcome` are the config, flat; then come figures and provenance.
        for name in list(rows[0])[list(rows[0]).index("outcome") :]:
            if rows[0][name] is not None:
                echo(f"  {name:<20} {rows[0][name]}")
    _show_curve(ledger, trial)
    for row in notes:
        if row["cause"] == "forgotten":
            echo(f"\nforgotten {row['at']}: {row['message']}")
    for row in failures:
        step = "before its first record" if row["step"] is None else f"at step {row['step']:,}"
        echo(f"\nfailed {row['at']} on {row['host']}, {step}, cause: {row['cause']}")
        echo((row["traceback"] or row["message"] or "").rstrip())
    for attempt, text in ledger.logs(trial).items():
        lines = text.rstrip().splitlines()
        echo(
            f"\nprinted by attempt {attempt}, the last {min(TAIL, len(lines))} of "
            f"{count(len(lines), 'line')} (all: sweep logs --trial {trial})"
        )
        echo("\n".join(f"  {line}" for line in lines[-TAIL:]))


def _show_curve(ledger: Ledger, trial: str) -> None:
    records = sorted(ledger.curves([trial]).to_pylist(), key=lambda r: (r["step"], r["split"]))
    if not records:
        return
    echo(f"\ncurve, the last {min(TAIL, len(records))} of {count(len(records), 'record')}")
    for record in records[-TAIL:]:
        echo(
            f"  step {record['step']:>7} {record['split']:<10} "
            + figures(record["loss"], record["accuracy"], json.loads(record["metrics"] or "{}"))
        )
