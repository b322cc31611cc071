"""Commands about jobs on a Ray cluster."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpt.printable import printable
from sweep.cli.common import (
    LINES,
    File,
    Quiet,
    Results,
    UserError,
    app,
    count,
    echo,
    note,
    say,
    stdout,
    whole_id,
)

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from sweep.cluster.submission import Job

Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard: http://HEAD:8265.",
    ),
]
AnyAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard: http://HEAD:8265.",
    ),
]
Which = Annotated[str, typer.Argument(metavar="FILE|JOB", help="A sweep file, or a job's id.")]


@app.command(
    epilog="Example: sweep submit experiments/quickstart.yaml --address http://HEAD:8265 "
    "--results s3://BUCKET/results"
)
def submit(
    file: File,
    address: Address,
    results: Results = "results",
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="A variable of the job; no secrets."),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Send Python files that the sweep file names.")
    ] = False,
    with_package: Annotated[
        bool, typer.Option("--with-package", help="Send fpt-sweep itself too, as it is here.")
    ] = False,
    python: Annotated[
        str, typer.Option(help="The cluster's Python that has fpt-sweep.")
    ] = "python",
    no_mirror: Annotated[
        bool, typer.Option("--no-mirror", help="Leave MLflow out; `sweep mirror` catches up.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", "--follow", help="Show its output until it ends.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run a sweep as a job on a Ray cluster. The same again finds the job that runs."""
    from sweep.cluster import submission

    if "://" not in results and not Path(results).is_absolute():
        raise UserError(
            f"--results {results}: a relative path means nothing on the cluster; give an absolute "
            "one that all its nodes share, or s3://, gs://, az://"
        )
    variables = dict(_variable(one) for one in env or ())
    sent = submission.parcel(file, allow_code=allow_code, package=with_package)
    for one in sent.notes:
        say(one)
    client = submission.connect(address)
    options = ["--no-mirror"] if no_mirror else []
    job, new = submission.submit(
        client, sent, results, variables=variables, options=options, python=python
    )
    if new:
        note(f"{job.id}: sent ({count(len(sent.files), 'file')}, {sent.size / 1024:,.0f} KiB)")
    else:
        note(f"{job.id}: is running already, and was not sent again")
    if wait:
        raise typer.Exit(_follow(client, job))
    echo(job.id)
    where = f"{shlex.quote(str(file))} --address {address}"
    note(f"  its output       sweep logs {where} --follow")
    note(f"  how far it is    sweep status {where} --results {shlex.quote(results)}")
    note(f"  to end it        sweep stop {where}")


@app.command(epilog="Example: sweep logs experiments/quickstart.yaml --address http://HEAD:8265")
def logs(
    which: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A sweep file, or a job's id.")
    ] = None,
    address: AnyAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    trial: Annotated[
        str | None,
        typer.Option("--trial", metavar="ID", help="What a trial's code has printed, not a job."),
    ] = None,
    results: Results = "results",
) -> None:
    """Print what a job has printed; with --trial what the code of a trial has."""
    if trial is not None:
        _print_trial(trial, results)
        return
    if which is None or address is None:
        raise UserError("logs: which? Give FILE and --address URL for a job, or --trial ID")
    from sweep.cluster import submission

    client = submission.connect(address)
    job = _job(client, which)
    if follow:
        raise typer.Exit(_follow(client, job))
    _print(submission.logs(client, job))


@app.command(epilog="Example: sweep stop experiments/quickstart.yaml --address http://HEAD:8265")
def stop(which: Which, address: Address, quiet: Quiet = False) -> None:
    """End a job: running trials save their states, and the next job goes on from them."""
    from sweep.cluster import submission

    client = submission.connect(address)
    job = _job(client, which)
    if job.running and submission.stop(client, job):
        note(f"{job.id}: stopping; running trials save their states")
    else:
        note(f"{job.id}: has ended already ({job.status.lower()})")


def _print_trial(trial: str, results: str) -> None:
    """Print what attempts at a trial have printed, the oldest first."""
    from sweep.ledger.ledger import Ledger

    ledger = Ledger(results)
    known = ledger.done() | ledger.states() | set(ledger.last_failures())
    trial = whole_id(trial, known, ledger.uri)
    found = ledger.logs(trial)
    for attempt, text in found.items():
        say(f"attempt {attempt}")
        echo(text.rstrip())
    if not found:
        say(f"trial {trial}: nothing was printed")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not (equals or name in os.environ):
        raise UserError(f"--env {name}: not set here; give NAME=VALUE")
    return name, value if equals else os.environ[name]


def _job(client: JobSubmissionClient, which: str) -> Job:
    """Return the job that a sweep file or an id stands for."""
    from sweep.cluster import submission
    from sweep.sweepfile import reading

    if Path(which).is_file():
        return submission.find(client, which, sweep=reading.load(which).sweep)
    return submission.find(client, which)


def _follow(client: JobSubmissionClient, job: Job) -> int:
    """Show a job's output until it ends; returns its exit code."""
    from sweep.cluster import submission

    try:
        ended = submission.follow(client, job, _print)
    except KeyboardInterrupt:
        say(f"\n{job.id}: goes on; `sweep stop {job.id}` ends it")
        return 1
    say(f"{ended.id}: {ended.status.lower()}")
    return 0 if ended.status == "SUCCEEDED" else ended.exit_code or 1


def _print(text: str) -> None:
    # Colours of Ray's own are dropped; whatever else is a command to a terminal, shown.
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    typer.echo(printable(text, keep=LINES + "\r"), nl=False, file=stdout())
