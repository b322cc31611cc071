"""Ray jobs: a sweep is sent to a cluster, and runs there from the head node while we go away.

What is sent is little: the sweep file, its lock, the local files that it names by relative paths,
and, only if that is allowed, Python files beside it. Absolute paths are the cluster's own, as are
its environment and its secrets: nothing of this machine's environment goes along.

A job's id is the digest of what was sent and where its results go, and the number of the attempt.
So the same sweep sent twice is one job: while it runs the second call finds it, and once it has
ended the next attempt goes on from the ledger. On the cluster the job is `sweep run`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fpt import plugins
from fpt.backbones.sources import HUB, PACKAGE, given_files
from sweep.cluster.connection import ClusterError, asks_for_token, is_secret, reachable, use_token
from sweep.ledger import provenance
from sweep.ledger.retrying import retry
from sweep.sweepfile import lock, reading
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import NO_PATH

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LIMIT = 100 * 1024**2
"""Bytes that a job's working directory may have, by Ray's own documentation."""

NOT_SENT = {"__pycache__", "node_modules", "venv"}
"""Folders that are never sent, beside all whose name begins with a dot."""

STOP_SECONDS = 60
"""What a job that is stopped has to save its states; Ray's own default is 3."""

PATIENCE = 60.0
"""Seconds in which a head node that has just started may become ready."""

RUNNING = ("PENDING", "RUNNING")
"""Statuses of a job that has not ended."""


@dataclass(frozen=True)
class JobPackage:
    """What is sent to a cluster."""

    name: str
    """The name of the sweep."""
    file: Path
    """The sweep file, as it was given."""
    files: Mapping[str, Path]
    """Path in the job's working directory -> file of this machine; sorted."""
    entry: str
    """The sweep file in the working directory."""
    size: int
    """Bytes."""
    notes: tuple[str, ...] = ()
    """What a person should know before it is sent."""

    def digest(self, results: str) -> str:
        """12 hex digits of what is sent, and of where its results go."""
        digest = hashlib.sha256(f"{results}\0{self.entry}\0".encode())
        for name, file in self.files.items():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{name}\0{content}\0".encode())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """A job of ours on a cluster."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED, as Ray says it."""
    sweep: str
    results: str
    attempt: int
    message: str
    exit_code: int | None
    started: datetime | None
    ended: datetime | None

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.status in RUNNING

    def __str__(self) -> str:
        text = self.status.lower()
        text += f" since {self.started:%Y-%m-%d %H:%M} UTC" if self.started and self.running else ""
        text += f" at {self.ended:%Y-%m-%d %H:%M} UTC" if self.ended else ""
        return f"{text}, into {self.results}"


# ------------------------------------------------------------------------------------ what is sent


def parcel(file: str | Path, *, allow_code: bool = False, package: bool = False) -> JobPackage:
    """Gather what a sweep needs on another machine, and judge it; nothing is sent.

    Args:
        file: The sweep file.
        allow_code: Whether classes that the file names may be imported here, and be sent.
        package: Also send fpt-sweep itself, as it is here; what it needs has to be there.

    Raises:
        SweepFileError: With all problems, if it cannot be sent so.
    """
    file = Path(file)
    spec = reading.load(file)
    words = set(_words(spec.model_dump(exclude={"description"})))
    classes = sorted(
        word
        for word in words
        if plugins.CLASS.fullmatch(word) and not word.startswith((HUB, PACKAGE, "shipped:"))
    )
    if classes and not allow_code:
        allowed = "--allow-code sends the Python files beside it, to be run on the cluster"
        raise SweepFileError([f"{file}: names code: {', '.join(classes)}; {allowed}"])
    named, notes = _named_files(file, words)
    folder = file.resolve().parent
    files = [file.resolve()]
    if lock.lock_file(file).is_file():
        files.append(lock.lock_file(file).resolve())
    problems: list[str] = []
    for path in named:
        found, wrong = _below(path)
        files += found
        problems += [f"{file}: {one}" for one in wrong]
    if classes:
        try:
            plugins.check_names(folder)
        except ValueError as error:
            problems.append(str(error))
        files += _modules(folder, classes)
    # Relative paths keep their meaning: the working directory begins where all of them meet.
    root = Path(os.path.commonpath([one.parent for one in files]))
    sent = {one.relative_to(root).as_posix(): one for one in files}
    if package:
        sent |= _package()
    size = sum(one.stat().st_size for one in sent.values())
    if size > LIMIT:
        largest = sorted(sent.items(), key=lambda item: -item[1].stat().st_size)[:3]
        shown = ", ".join(f"{n} ({o.stat().st_size / 2**20:.0f} MiB)" for n, o in largest)
        problems.append(
            f"{file}: names {size / 2**20:.0f} MiB of local files, and a job's working directory "
            f"may have {LIMIT / 2**20:.0f}; the largest: {shown}; put them on storage that the "
            "cluster shares, and name them by absolute paths"
        )
    if problems:
        raise SweepFileError(problems)
    entry = file.resolve().relative_to(root).as_posix()
    return JobPackage(spec.sweep, file, dict(sorted(sent.items())), entry, size, tuple(notes))


def _words(value: Any) -> Iterator[str]:
    # Every piece of text in a sweep file, keys aside.
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _words(one)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from _words(one)
    elif isinstance(value, str):
        yield value


def _named_files(file: Path, words: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Return the local files and folders that trials name by relative paths, and notes on the
    others.

    Raises:
        SweepFileError: If the sweep is wrong in other ways than that the cluster's files are not
            here.
    """
    elsewhere = sorted(
        word
        for word in words
        if word.startswith(("/", "~", "$")) and not Path(os.path.expandvars(word)).exists()
    )
    notes = [f"{path}: not here; taken to be on the cluster" for path in elsewhere]
    try:
        sweep = load(file)
    except SweepFileError as error:
        wrong = [one for one in error.problems if not any(path in one for path in elsewhere)]
        if wrong:
            raise SweepFileError(wrong) from None
        return [], notes
    absolute = {os.path.expanduser(os.path.expandvars(word)) for word in words}
    paths: dict[Path, None] = {}
    for point in sweep.all:
        config = point.config
        weights = config.backbone.weights
        if config.reads_weights and weights and not weights.startswith(NO_PATH):
            paths |= {} if weights in absolute else dict.fromkeys(given_files(weights))
        for name in type(config.task).model_fields:
            value = getattr(config.task, name)
            if isinstance(value, Path) and str(value) not in absolute:
                paths[value] = None
    return list(paths), notes


def _below(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files at a path that a sweep file names, and those that lead out of it."""
    if path.is_file():
        return [path.absolute()], []
    found, problems = [], []
    whole = path.resolve()
    for folder, folders, names in os.walk(path):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in NOT_SENT]
        for name in sorted(names):
            one = Path(folder, name)
            if name.startswith(".") or not one.is_file():
                continue
            if not one.resolve().is_relative_to(whole):
                problems.append(
                    f"{one}: a link that leads out of {path}; not sent: name what it leads to"
                )
            else:
                found.append(one.absolute())
    return found, problems


def _modules(folder: Path, classes: Iterable[str]) -> list[Path]:
    """Return the Python files beside a sweep file, and the packages of classes that it names."""
    found = sorted(folder.glob("*.py"))
    for package in {name.partition(":")[0].partition(".")[0] for name in classes}:
        if (folder / package).is_dir():
            found += [one for one in _below(folder / package)[0] if one.suffix == ".py"]
    return found


def _package() -> dict[str, Path]:
    """This package as it is here: at the working directory's root they come before others."""
    import fpt

    where = Path(fpt.__file__).parent.parent
    return {
        one.relative_to(where).as_posix(): one
        for name in ("fpt", "sweep")
        for one in _below(where / name)[0]
    }


# ------------------------------------------------------------------------------------------- jobs


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the cluster's job server.

    Raises:
        ClusterError: If none answers at the address, or it refuses us.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise ClusterError(
            f"--address {address}: not the address of a dashboard; give http://HEAD:8265, the one "
            "that `ray start --head` printed"
        )
    if parts.password is not None or parts.username is not None:
        raise ClusterError(
            "--address: holds a password, which would be shown; leave it out: RAY_AUTH_TOKEN_PATH "
            "names the file with the cluster's token"
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    reachable(f"{parts.hostname}:{port}", "the http://HEAD:8265 that `ray start --head` printed")
    use_token()
    # RAY_ADDRESS would win over the address.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        what = f"Ray's job client cannot be imported ({error}); pip install 'ray[default]'"
        raise ClusterError(what) from error
    for handler in logging.getLogger("ray").handlers:  # its packaging, line by line
        handler.setLevel(logging.ERROR)
    client: JobSubmissionClient = _told(address, lambda: JobSubmissionClient(address))
    return client


def _told(address: str, ask: Callable[[], Any]) -> Any:
    """Return what a request gives; what Ray raises becomes one line, without headers.

    Raises:
        ClusterError: If the request failed.
    """
    from ray.exceptions import AuthenticationError
    from requests.exceptions import RequestException

    try:
        return ask()
    except AuthenticationError:
        raise ClusterError(f"{address}: {asks_for_token()}") from None
    except (RequestException, ConnectionError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"{address}: {first}") from None


def jobs(client: JobSubmissionClient, sweep: str | None = None) -> list[Job]:
    """Our jobs on a cluster, the newest last.

    Args:
        client: As `connect` gives it.
        sweep: Only those of the sweep of this name.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    found = [
        _job(details)
        for details in _told("the cluster", client.list_jobs)
        if (details.metadata or {}).get("fpt-sweep")
    ]
    ours = [job for job in found if sweep is None or job.sweep == sweep]
    return sorted(ours, key=lambda job: (job.started or datetime.min.replace(tzinfo=UTC), job.id))


def _job(details: Any) -> Job:
    known = details.metadata or {}
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        sweep=known["sweep"],
        results=known["results"],
        attempt=int(known["attempt"]),
        message=(details.message or "").strip(),
        exit_code=details.driver_exit_code,
        started=_moment(details.start_time),
        ended=_moment(details.end_time),
    )


def _moment(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def submit(
    client: JobSubmissionClient,
    sent: JobPackage,
    results: str,
    *,
    variables: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    python: str = "python",
) -> tuple[Job, bool]:
    """Send a sweep, unless a job of just this is running.

    Args:
        client: As `connect` gives it.
        sent: What `parcel` gathered.
        results: The ledger, as the cluster sees it: an absolute path, or s3://, gs://, az://.
        variables: Environment variables of the job, which everyone on the cluster can read.
        options: Further options of `sweep run`.
        python: The cluster's Python, if `python` is not the one that has fpt-sweep.

    Returns:
        The job, and whether it is new.

    Raises:
        ClusterError: If the cluster does not take it, or a variable may hold a secret.
    """
    variables = dict(variables or {})
    if hidden := sorted(n for n, value in variables.items() if is_secret(n, value)):
        raise ClusterError(
            f"--env {hidden[0]}: may hold a secret, and everyone on the cluster can read a job's "
            "variables; set it on the head node before `ray start`: drivers hand it to workers"
        )
    digest = sent.digest(results)
    stem = f"{sent.name}-{digest}"
    before = [job for job in jobs(client, sent.name) if job.id.startswith(f"{stem}-")]
    for job in before:
        if job.running:
            return job, False
    attempt = 1 + max((job.attempt for job in before), default=0)
    command = [python, "-m", "sweep", "run", sent.entry, "--results", results, *options]
    name = f"{stem}-{attempt}"
    with tempfile.TemporaryDirectory(prefix="fpt-sweep-") as folder:
        for path, file in sent.files.items():
            copy = Path(folder, path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        submit = functools.partial(
            client.submit_job,
            # `exec`, so that what stops the job reaches the driver and not a shell.
            entrypoint=f"exec {shlex.join(command)}",
            submission_id=name,
            runtime_env={
                "working_dir": folder,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)} | variables,
            },
            metadata={
                "fpt-sweep": str(provenance.version("fpt-sweep")),
                "sweep": sent.name,
                "results": results,
                "attempt": str(attempt),
            },
        )
        try:
            # The head node's agent starts last.
            retry(
                lambda: _told("the cluster", submit),
                ClusterError,
                within=PATIENCE,
                pauses=(1.0, 1.0),
                gives_up=lambda error: "No available agent" not in str(error),
            )
        except ClusterError as error:
            if "already exists" not in str(error):
                raise
            # Somebody else sent the same at the same moment.
            return find(client, name), False
    return find(client, name), True


def find(client: JobSubmissionClient, name: str, *, sweep: str | None = None) -> Job:
    """Return the job of this id, or the newest of a sweep: one that runs, if there is one.

    Raises:
        ClusterError: If there is none.
    """
    known = jobs(client)
    found = [job for job in known if job.sweep == sweep or (sweep is None and job.id == name)]
    if not found:
        ids = ", ".join(job.id for job in known[-5:]) or "none of ours"
        raise ClusterError(f"{name}: no such job on this cluster; it has {ids}")
    return next((job for job in reversed(found) if job.running), found[-1])


def logs(client: JobSubmissionClient, job: Job) -> str:
    """Return all that a job has printed.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    return str(_told(job.id, lambda: client.get_job_logs(job.id)))


def follow(client: JobSubmissionClient, job: Job, write: Callable[[str], None]) -> Job:
    """Pass on what a job prints until it ends; returns how it ended.

    Ray's stream of it breaks off, and may look well ended, where the head loses the job's node for
    a moment. So it is the job that says whether it has ended. Each stream begins at the first line.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    from aiohttp import ClientError

    written = 0

    def pass_on(text: str, before: int = 0) -> None:
        nonlocal written
        if new := text[max(0, written - before) :]:
            write(new)
        written = max(written, before + len(text))

    async def lines() -> None:
        before = 0
        async for text in client.tail_job_logs(job.id):
            pass_on(text, before)
            before += len(text)

    while True:
        with suppress(ClusterError, ClientError):
            _told(job.id, lambda: asyncio.run(lines()))
        now = find(client, job.id)
        with suppress(ClusterError):  # its node may be gone for good
            pass_on(logs(client, now))
        if not now.running:
            return now
        time.sleep(1)


def stop(client: JobSubmissionClient, job: Job) -> bool:
    """Ask a job to save its states and end; False if it had ended.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    return bool(_told(job.id, lambda: client.stop_job(job.id)))
