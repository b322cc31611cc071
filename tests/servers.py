"""Servers as several people would share them, on loopback: PostgreSQL, MLflow on it, S3."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

PATIENCE = 400.0
"""Seconds for a server to answer, on a machine with other things to do."""

RUNS = """
    SELECT tags.value, count(*) FROM tags JOIN runs ON tags.run_uuid = runs.run_uuid
    WHERE tags.key = %s AND runs.lifecycle_stage = 'active' AND runs.status = 'FINISHED'
      AND runs.run_uuid IN (SELECT run_uuid FROM tags WHERE key = %s AND value = %s)
    GROUP BY tags.value
"""
"""How many finished runs each trial of a sweep has, asked of the database itself."""


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_binaries() -> Path:
    """Where PostgreSQL's programs are; skips the test where there are none."""
    path = os.pathsep.join(map(str, [*Path("/usr/lib/postgresql").glob("*/bin"), os.defpath]))
    for name in ("initdb", "pg_ctl"):
        if (found := shutil.which(name, path=path) or shutil.which(name)) is None:
            pytest.skip(f"PostgreSQL is not installed: no {name}")
    return Path(found).resolve().parent


class Postgres:
    """A database server with a folder of its own; it refuses to be root, and gets another user."""

    def __init__(
        self, folder: Path, port: int, *, inside: Sequence[str] = (), env: Mapping[str, str] = {}
    ) -> None:
        self.folder = folder
        self.port = port
        self._inside = [*inside]
        self._env = {**os.environ, **env, "LC_ALL": "C"}
        self._programs = postgres_binaries()
        folder.mkdir(parents=True)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "postgres", "-N")

    @property
    def uri(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = f"{self.folder}/log"
        self._run(
            "pg_ctl", "-D", f"{self.folder}/data", "-l", log, "-w", "-t", f"{PATIENCE:.0f}",
            "-o", options, "start",
        )  # fmt: skip

    def stop(self) -> None:
        """Stop at once, as a crash would: what was not written is recovered from its log."""
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "-w", "stop")

    def runs(self, sweep: str) -> dict[str, int]:
        """Trial id -> finished runs of it that MLflow has, of a sweep."""
        import psycopg2

        # Through the socket in its folder, which is there for all namespaces.
        connection = psycopg2.connect(host=str(self.folder), port=self.port, user="postgres")
        try:
            with connection.cursor() as cursor:
                cursor.execute(RUNS, ("fpt_sweep.trial_id", "fpt_sweep.sweep", sweep))
                return dict(cursor.fetchall())
        finally:
            connection.close()

    def _run(self, program: str, *words: str) -> None:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        command = [*self._inside, *(user if os.geteuid() == 0 else []), self._programs / program]
        done = subprocess.run(
            [*command, *words], env=self._env, cwd="/", text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            log = self.folder / "log"
            text = log.read_text()[-2000:] if log.exists() else done.stdout
            raise AssertionError(f"{program} ended with code {done.returncode}: {text}")


class MlflowServer:
    """`mlflow server` on a database."""

    def __init__(
        self,
        folder: Path,
        database: str,
        port: int,
        *,
        inside: Sequence[str] = (),
        env: Mapping[str, str] = {},
    ) -> None:
        self.folder = folder
        self.database = database
        self.port = port
        self._inside = [*inside]
        # Its job workers would be eight processes and a gigabyte.
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._env = {**os.environ, **env, **quiet}
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    @property
    def uri(self) -> str:
        """What MLFLOW_TRACKING_URI is to be."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [
            *self._inside, sys.executable, "-W", "ignore", "-m", "mlflow", "server",
            "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.database,
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            text = (self.folder / "log").read_text()[-2000:]
            assert self._process.poll() is None, f"mlflow server ended: {text}"
            assert time.monotonic() < deadline, f"mlflow server does not answer: {text}"
            time.sleep(0.3)

    def _answers(self) -> bool:
        # From inside its own network, where nobody else can ask.
        ask = (
            "import urllib.request as r; o = r.build_opener(r.ProxyHandler({})); "
            f"o.open('{self.uri}/health', timeout=5).close()"
        )
        command = [*self._inside, sys.executable, "-S", "-c", ask]
        return subprocess.run(command, capture_output=True).returncode == 0

    def stop(self) -> None:
        """Kill it with all that it started."""
        if self._process is not None:
            try:
                leader = psutil.Process(self._process.pid)
                found = [leader, *leader.children(recursive=True)]
            except psutil.NoSuchProcess:
                found = []
            for process in found:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            self._process.wait()
            self._process = None


class S3Server:
    """A server that speaks S3. `start` it, and `stop` it whether it started or not."""

    def __init__(self, folder: Path, *, env: Mapping[str, str] = {}) -> None:
        self.folder = folder
        self.port = free_port()
        self._env = {**os.environ, **env}
        self._processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True)

    @property
    def variables(self) -> dict[str, str]:
        """What opens its buckets, in the environment of a process."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start, and wait until it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Kill it, with all that it holds."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes = []

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        import boto3

        given = self.variables
        client = boto3.client(
            "s3",
            endpoint_url=given["AWS_ENDPOINT_URL"],
            aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
            region_name=given["AWS_REGION"],
        )
        client.create_bucket(Bucket=name)

    def _start(self, *command: str) -> None:
        log = self.folder / f"{len(self._processes)}.log"
        with log.open("wb") as stream:
            self._processes.append(
                subprocess.Popen(
                    command, env=self._env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
                )
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            text = "".join(log.read_text()[-2000:] for log in self.folder.glob("*.log"))
            assert not any(p.poll() is not None for p in self._processes), f"it ended: {text}"
            assert time.monotonic() < deadline, f"it does not answer: {text}"
            time.sleep(0.2)

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            opener.open(self.variables["AWS_ENDPOINT_URL"], timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


class Moto(S3Server):
    """moto's stand-in for S3: quick to start, one process, nothing on disk."""

    def start(self) -> None:
        """Start, and wait until it answers."""
        pytest.importorskip("moto", reason="moto[s3] is not installed")
        self._start(
            *(sys.executable, "-W", "ignore", "-m", "moto.server"),
            *("-H", "127.0.0.1", "-p", f"{self.port}"),
        )
        self._wait()


CEPH = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}/0]
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.daemon
mon data = {folder}/mon
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
rgw data = {folder}/rgw
"""
"""A monitor, one store in memory, and the gateway."""


class Ceph(S3Server):
    """Ceph's S3 gateway on a store in memory: a server that people run in earnest."""

    PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")

    @classmethod
    def missing(cls) -> str | None:
        """A program of Ceph's that is not installed."""
        return next((name for name in cls.PROGRAMS if shutil.which(name) is None), None)

    def start(self) -> None:
        """Start, and wait until it answers."""
        if name := self.missing():
            pytest.skip(f"Ceph is not installed: no {name}")
        folder, port, fsid = self.folder, free_port(), str(uuid.uuid4())
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        config = folder / "ceph.conf"
        config.write_text(CEPH.format(fsid=fsid, port=port, folder=folder))
        keys, monitors, same = f"{folder}/keyring", f"{folder}/monmap", ("-c", f"{config}")
        all_ = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self._run("ceph-authtool", keys, "--create-keyring", "--gen-key", "-n", "mon.", *all_)
        for name in ("client.admin", "osd.0"):
            self._run("ceph-authtool", keys, "--gen-key", "-n", name, *all_)
        address = f"[v2:127.0.0.1:{port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monitors)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keys, *same)
        self._start("ceph-mon", "-f", "-i", "a", *same)
        self._run("ceph", *same, "osd", "create")
        self._run("ceph-osd", "--mkfs", "-i", "0", *same)
        self._start("ceph-osd", "-f", "-i", "0", *same)
        user = ("--uid=test", "--display-name=test", "--access-key=test", "--secret-key=test")
        self._run("radosgw-admin", *same, "user", "create", *user)
        frontend = f"--rgw-frontends=beast endpoint=127.0.0.1:{self.port}"
        self._start("radosgw", "-f", "-n", "client.admin", frontend, *same)
        self._wait()

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"{command[0]} ended with code {done.returncode}: {done.stdout}"
        )
