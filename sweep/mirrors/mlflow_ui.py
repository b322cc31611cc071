"""MLflow's pages on a ledger's runs: the server that shows them, and the page of a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweep.ledger.ledger import Ledger
from sweep.mirrors.mlflow_stores import (
    ENVIRONMENT,
    PREFIX,
    SWEEP,
    TRIAL,
    VIEW,
    VIEW_TAG,
    MirrorError,
    artifacts_folder,
    home,
    is_ours,
    is_server,
    tracking_uri,
    where,
)


def runs_of(ledger: Ledger, sweep: str, ids: Sequence[str]) -> dict[str, str]:
    """Return the runs of trials in our own MLflow: trial -> its page after the server's address.

    Read without MLflow, which takes seconds to import, and nothing where it cannot be read.
    """
    database = Path(where(ledger))
    if not database.is_file():
        return {}
    marks = ", ".join("?" * len(ids))
    query = (
        "SELECT trial.value, runs.experiment_id, runs.run_uuid FROM runs "
        "JOIN tags AS trial USING (run_uuid) JOIN tags AS sweep USING (run_uuid) "
        "WHERE sweep.key = ? AND sweep.value = ? AND runs.lifecycle_stage = 'active' "
        f"AND trial.key = ? AND trial.value IN ({marks})"
    )
    # It belongs to MLflow, which may have changed it or be writing to it.
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        found = connection.execute(query, [SWEEP, sweep, TRIAL, *ids]).fetchall()
        # Without the last part MLflow shows it among its pages on language models.
        return {
            trial: f"experiments/{experiment}/runs/{run}?workflowType=machine_learning"
            for trial, experiment, run in found
        }
    return {}


def ui_command(ledger: Ledger, port: int = 5000) -> list[str]:
    """Return the command that serves MLflow's UI on a ledger's runs, on loopback: it has no
    password.
    """
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", tracking_uri(ledger),
        "--artifacts-destination", str(artifacts_folder(ledger)),
    ]  # fmt: skip


def serve_ui(ledger: Ledger, port: int = 5000, *, ready: Callable[[str], None]) -> None:
    """Serve MLflow's UI until SIGINT or SIGTERM; must run in the main thread.

    Args:
        ledger: Whose runs are shown.
        port: The port on 127.0.0.1.
        ready: Called as soon as the UI answers, with its address and below it a line for the page
            of each sweep. If MLFLOW_TRACKING_URI names a server, that is the address, and nothing
            is started.

    Raises:
        MirrorError: If there is nothing to show, or the server does not start.
    """
    uri = tracking_uri(ledger)
    if is_server(uri):
        ready(where(ledger))
        return
    if is_ours() and not (home(ledger) / "mlflow.db").exists():
        raise MirrorError(
            f"{where(ledger)}: no such file, so that there are no runs to show; `sweep run FILE` "
            "makes it, and for a ledger that is there already `sweep mirror FILE`"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MirrorError(
                f"port {port}: {error.strerror}; name another: --port {port + 1}"
            ) from error
    with tempfile.TemporaryFile("w+") as output, _interruptible():
        server = subprocess.Popen(
            ui_command(ledger, port),
            # Its job workers would be eight processes and a gigabyte.
            env=ENVIRONMENT | os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            while server.poll() is None:
                try:
                    pages = _pages(address)
                except OSError:
                    time.sleep(0.2)
                else:
                    ready("\n".join([address, *(f"{name}: {url}" for name, url in pages.items())]))
                    break
            if server.wait():
                output.seek(0)
                tail = "\n".join(output.read().splitlines()[-10:])
                raise MirrorError(f"MLflow's server ended with code {server.returncode}:\n{tail}")
        except KeyboardInterrupt:
            pass
        finally:
            _end(server)


@contextmanager
def _interruptible() -> Iterator[None]:
    # SIGTERM ends this process as Ctrl-C does, so that the server does not outlive it.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pages(address: str) -> dict[str, str]:
    """Return the sweeps that an MLflow server has, the newest first: name -> address of its runs.

    Raises:
        OSError: If it does not answer.
    """
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/search",
        json.dumps(
            {
                "filter": f"name LIKE '{PREFIX}%'",
                "max_results": 1000,
                "order_by": ["last_update_time DESC"],
            }
        ).encode(),
        {"Content-Type": "application/json"},
    )
    # Loopback is not reached through a proxy.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=20) as reply:
        found = json.load(reply).get("experiments", [])
    # Whoever comes by the list of experiments sees the UI for language-model applications, until
    # the switch to "Model training" was found.
    return {
        experiment["name"].removeprefix(PREFIX): f"{address}/#/experiments/"
        f"{experiment['experiment_id']}/runs?workflowType=machine_learning"
        f"{f'&viewStateShareKey={VIEW}' if _has_view(experiment) else ''}"
        for experiment in found
    }


def _has_view(experiment: Mapping[str, Any]) -> bool:
    # An experiment of an earlier version has none until it is mirrored again.
    return any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", ()))


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            server.poll()  # Reaps it; a zombie would keep its group alive.
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
