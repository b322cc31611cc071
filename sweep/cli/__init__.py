"""The command `sweep`. Results go to stdout, everything else to stderr.

Exit codes: 0, every trial is done (a diverged one is done); 1, some are not; 2, the input was
wrong and nothing was started; 130, Ctrl-C. A user's mistake is a message; a traceback is a bug of
ours. Modules that cost seconds to import (Ray, torch, MLflow) are imported by the commands that use
them, so that validate, plan, status and table answer at once. No option overrides a field of a
trial: another experiment is another file.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import sys

from fpt.files import ensure_home

from sweep.cli import files, running, jobs, results, report  # isort: skip  # as --help lists them
from sweep.cli import query, studies, models, archive, upkeep  # isort: skip
from sweep.cli.common import UserError, app, say
from sweep.ledger import provenance

PANELS = {
    "Before a run": ("init", "validate", "plan", "fetch", "schema"),
    "Running": ("run", "status", "pause", "retry", "debug"),
    "On a cluster": ("submit", "logs", "stop"),
    "Results": ("table", "claims", "show", "report", "figures", "query", "columns", "trace"),
    "Models": ("groups", "weights", "attention", "representations"),
    "Sharing": ("export", "publish", "merge", "diff"),
    "Upkeep": ("mirror", "ui", "studies", "gc", "compact", "forget", "upgrade"),
}
"""Group of commands in `sweep --help` -> its commands."""

for _group, _names in PANELS.items():
    for _command in app.registered_commands:
        if _command.callback is not None and _command.callback.__name__ in _names:
            _command.rich_help_panel = _group

__all__ = [
    "app",
    "archive",
    "files",
    "jobs",
    "main",
    "models",
    "query",
    "report",
    "results",
    "running",
    "studies",
    "upkeep",
]

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""Why stdout takes no more: what it is sent to is full."""


def main() -> None:
    """Run the command line."""
    # A large sweep is a million objects, nearly none of them garbage; at 700, the default, looking
    # them over again and again takes a tenth of a command's time.
    gc.set_threshold(100_000)
    ensure_home()
    for stream in (sys.stdout, sys.stderr):
        # Tables have ± and †. A file or a pipe gets UTF-8 whatever the locale says; a terminal
        # what it can show.
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            say("interrupted")
        raise
    except OSError as error:
        # With a name it is about a file, and a bug: files have messages of their own.
        if error.errno not in UNWRITTEN or error.filename is not None:
            raise
        # What is left in its buffer would be complained of once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say(f"output: cannot be written ({os.strerror(error.errno)})")
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in provenance.TRAINING:
            raise
        say(provenance.lacks(error.name))
        sys.exit(2)
    except Exception as error:
        if not isinstance(error, _mistakes()):
            raise
        say(str(error))
        sys.exit(2)


def _mistakes() -> tuple[type[Exception], ...]:
    """Return what a user, a disk or a missing data set did, as opposed to a bug of ours."""
    from fpt.files import DataError
    from sweep.analysis.queries import QueryError
    from sweep.execution.driver import ClusterError
    from sweep.ledger.ledger import LedgerError
    from sweep.mirrors.mlflow_stores import MirrorError
    from sweep.mirrors.optuna_studies import StudiesError
    from sweep.sweepfile.schema import SweepFileError

    return (
        ClusterError,
        DataError,
        LedgerError,
        MirrorError,
        QueryError,
        SweepFileError,
        StudiesError,
        UserError,
    )
