"""A connection to Ray, a cluster or one of our own, and what of this environment goes along.

Three kinds of variables reach workers, each in its own way, and no others do:

- `WORKERS` say how a worker computes. They are the same everywhere.
- `FORWARDED` say where things are. They stand in the runtime environment of the run, which everyone
  who can look at the cluster can read: no secret may be among them.
- `FORWARDED_SECRETS` open things, or may hold a password. They are handed from the driver's memory
  to the workers' (`sweep.execution.channel`), stand in no job's description and in no file, and a
  node's own win.

A job that is submitted takes none of the submitting machine's along: the cluster has its own.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fpt import plugins
from sweep.cluster import local_ray
from sweep.ledger import machine
from sweep.ledger.retrying import retry

WORKERS = {
    # A core a worker.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # fp32 products whose bits do not depend on the number of threads.
    "MKL_CBWR": "AUTO,STRICT",
    # Relative paths of a sweep file mean what they mean to the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Environment variables of the workers."""

FORWARDED = ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "FPT_SWEEP_CACHE")
"""Variables that workers of another Ray get from the driver, where it has them; all jobs of a
cluster can read them, so that no secret may be among them."""

FORWARDED_SECRETS = re.compile(
    r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|(HTTP|HTTPS|ALL|NO)_PROXY|(AWS|AZURE|GOOGLE)_[A-Z0-9_]+",
    re.IGNORECASE,
)
"""Variables that open the Hub, the network or a bucket."""

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|(^|_)KEY(_|$)", re.IGNORECASE)
"""What the name of a variable that holds a secret contains."""

QUIET = {
    # Tune would write five files a trial, rewrite a file of its own over all trials every few
    # seconds, catch Ctrl-C, and print tables and tracebacks.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Ray would report usage, and advise on a future version of itself.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables of the driver's process."""

SHUTDOWN_SECONDS = 20.0
"""What Ray may take to end."""

UNPACK_SECONDS = 30.0
"""What a node may take to unpack a job's working directory."""

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""What Ray reads, and nobody else here, to open a cluster that asks for a token."""


class ClusterError(Exception):
    """A Ray cluster that cannot be used, or not so; the message says what to look at."""


def reachable(address: str, what: str = "the HOST:PORT that `ray start --head` printed") -> None:
    """Ask the address for a connection: Ray itself would go on trying for minutes.

    Args:
        address: HOST:PORT, with or without a scheme.
        what: What should have been given.

    Raises:
        ClusterError: If nothing answers there.
    """
    host, _, port = re.sub(r"^[a-z]+://", "", address).rstrip("/").rpartition(":")
    if not port.isdigit():
        return  # "auto", which Ray resolves by itself
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {address}: no Ray answers there ({error}); give {what}, or leave it out to "
            "use this machine"
        ) from error


def cluster_id(address: str) -> str | None:
    """Return what a cluster calls itself, by whichever of its addresses it is asked; None: nothing.

    Two clusters may have one address, in networks that know nothing of each other.

    Raises:
        ClusterError: If there is none at `address`, or one that does not let us in.
    """
    if address.startswith(("http://", "https://", "ray://")):
        return None  # `connected` says what of it
    reachable(address)
    use_token()
    set_raylet_pid()
    import ray
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        found = canonicalize_bootstrap_address(address)
        return None if found is None else str(GcsClient(address=found).cluster_id.hex())
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise _refused(address, error) from None


@dataclass(frozen=True)
class Connection:
    """A Ray to work with."""

    own: bool
    """Whether it is one of our own, which ends with the connection."""
    scratch: Path
    """A folder of this run's, removed at its end."""
    log: Path | None
    """What Ray itself says, between whose lines none of ours are; None where it cannot be kept."""

    def abandon(self) -> None:
        """Remove what is ours without asking Ray, for a process that is about to end."""
        if self.own:
            local_ray.end_processes([self.scratch])
        shutil.rmtree(self.scratch, ignore_errors=True)

    def draining_nodes(self) -> frozenset[str]:
        """Return the ids of the nodes that are about to be taken away; may wait for Ray."""
        from ray._private.state import state  # Ray itself looks here, and offers nothing else

        return frozenset(state.get_draining_nodes())

    def ended(self) -> list[str]:
        """Return the processes of our own Ray that have ended and without which nothing trains."""
        import ray

        node = ray._private.worker._global_node
        if not self.own or node is None:
            return []
        return [name for name, _ in node.dead_processes() if name in local_ray.NEEDED]


@contextmanager
def connected(address: str | None, max_concurrent: int | None) -> Iterator[Connection]:
    """Connect to the Ray at `address`, or start one of our own that ends with this block.

    Raises:
        ClusterError: If there is none at `address`, one that does not let us in, or this machine
            lets none be started.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    set_raylet_pid()
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(local_ray.scratch_folder())
        except local_ray.LimitError as error:
            raise ClusterError(str(error)) from None
        options = _start_here(max_concurrent, scratch) if address is None else _join(address)
        # Workers of our own Ray inherit this process's variables, and so may be started ahead of
        # time, which Ray does not do for those that are given a runtime_env.
        variables = QUIET | WORKERS | module_path() if address is None else QUIET
        stack.enter_context(environment(variables))
        log = stack.enter_context(
            local_ray.apart(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        )
        import ray

        stack.callback(_disconnect, own=address is None, scratch=scratch)
        try:
            with local_ray.kept_from_children():
                ray.init(
                    **options,
                    job_config=_job_config(),
                    namespace="fpt-sweep",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            if address is None:
                raise ClusterError(_no_start(error, log)) from None
            raise _refused(address, error) from None
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        # Without this it prints what a node leaves when it dies, in dozens of lines.
        ray._private.worker._worker_logs_enabled = False
        restore_cwd()
        yield Connection(address is None, scratch, log)


def check_startable(address: str | None, max_concurrent: int | None) -> None:
    """Refuse limits of this machine under which no Ray of our own starts, where one is wanted.

    Raises:
        ClusterError: If this process may not have what it takes.
    """
    if address is None and "RAY_ADDRESS" not in os.environ:
        try:
            local_ray.check_limits(_cores(max_concurrent))
        except local_ray.LimitError as error:
            raise ClusterError(str(error)) from None


def _cores(max_concurrent: int | None) -> int:
    return max(machine.cores(), max_concurrent or 1)


def _start_here(max_concurrent: int | None, scratch: Path) -> dict[str, Any]:
    """Return the options of a Ray of our own."""
    if not set(AUTH) & os.environ.keys():
        # A Ray of one's own asks for a token, and would leave one in the home folder. Kept to the
        # end of this process, since Ray reads it once.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {
        "address": "local",
        "num_cpus": _cores(max_concurrent),
        "include_dashboard": False,
        "object_store_memory": 100 * 1024**2,
        "_temp_dir": str(scratch),
    }


def _join(address: str) -> dict[str, Any]:
    """Return the options of a cluster's Ray.

    Raises:
        ClusterError: If nothing answers there, or something else than a Ray for drivers.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"--address {address}: is a dashboard's; `sweep submit` takes it, a run the "
            "HOST:PORT that `ray start --head` printed"
        )
    reachable(address)
    use_token()
    return {"address": address, "runtime_env": {"env_vars": runtime_env_vars()}}


def _no_start(error: Exception, log: Path | None) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = f"; what Ray said: {log}" if log is not None and log.stat().st_size else ""
    return (
        f"Ray cannot be started on this machine ({first}){said}; look at its limits (`ulimit -a`) "
        "and its free memory, or name a running cluster (--address)"
    )


def _disconnect(*, own: bool, scratch: Path) -> None:
    """End the connection, and a Ray of our own with all its processes.

    Without a head Ray would wait for it, for a minute, and then abort this process: so its own
    processes are ended first, and a wait is left to a thread that ends with this process.
    """
    import ray

    if own and (node := ray._private.worker._global_node) is not None:

        def end(**_: object) -> None:
            # Ray would give each of them a second to take a SIGTERM, which is kept from them.
            local_ray.end_processes([scratch])
            for process in itertools.chain(*node.all_processes.values()):
                process.process.poll()  # else it would count as one that was left running

        setattr(node, "kill_all_processes", end)  # noqa: B010
    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_SECONDS)
    if own:
        local_ray.end_processes([scratch])


def restore_cwd() -> None:
    """Go back to the working folder, if it was made anew under this process.

    Nodes that share a folder for Ray's files unpack a job's working directory once each, over the
    one that the driver is in; that is done once all of them have been asked. For a moment there is
    none.

    Raises:
        ClusterError: If it does not come back.
    """

    def stay() -> None:
        try:
            os.getcwd()
        except FileNotFoundError:
            os.chdir(os.environ.get("PWD", ""))
            os.getcwd()

    try:
        retry(stay, FileNotFoundError, within=UNPACK_SECONDS, pauses=(0.05, 0.05))
    except FileNotFoundError:
        what = "this process's working folder was removed"
        raise ClusterError(f"{os.environ.get('PWD', 'PWD')}: {what}; run again") from None


def use_token() -> None:
    """Let Ray use a token that the environment names; without a mode it would leave it alone.

    Kept to the end of this process, since Ray reads it once.
    """
    if set(AUTH) & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def set_raylet_pid() -> None:
    """Let a process whose parent has ended (`nohup`, a container's init) close its connection.

    Ray takes it for a worker, whose parent is its node: where a message finds the connection closed
    it asks whether the node is alive, and without a process id it asks for the parent. It would
    then end this process without a word.

    Kept to the end of this process, since Ray reads it once; a job has its node's.
    """
    os.environ.setdefault("RAY_RAYLET_PID", str(os.getpid()))


def _refused(address: str, error: Exception) -> ClusterError:
    # Ray's own words are many lines, and name what they were given.
    text = str(error)
    if "uthenticat" in text:
        why = asks_for_token()
    elif "Version mismatch" in text:
        found = [" ".join(pair) for pair in re.findall(r"(Ray|Python): *([\w.+]+)", text)]
        half = len(found) // 2  # the cluster's first
        there, here = ", ".join(found[:half]), ", ".join(found[half:])
        why = f"it runs {there}, this process {here}; install the same releases on both"
    else:
        why = (text.splitlines() or [type(error).__name__])[0]
    return ClusterError(f"--address {address}: no way in: {why}")


def asks_for_token() -> str:
    """Return what to do about a cluster that asks for a token."""
    return (
        "it asks for a token, or refuses the one that it got; set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN) to the cluster's own, here as on its nodes"
    )


def runtime_env_vars() -> dict[str, str]:
    """Return the runtime environment's variables, for workers of another Ray."""
    variables = WORKERS | {name: os.environ[name] for name in FORWARDED if name in os.environ}
    # Inside a job Ray adds these to the job's own, and refuses what stands in both.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    own = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {k: v for k, v in (variables | module_path()).items() if k not in own}


def forwarded_secrets() -> dict[str, str]:
    """Return what the driver hands to workers of another Ray, from memory to memory."""
    return {name: value for name, value in os.environ.items() if FORWARDED_SECRETS.fullmatch(name)}


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable may hold a secret: by its name, or an address with a password in
    it.
    """
    if SECRET.search(name):
        return True
    try:
        return "://" in value and urlsplit(value).password is not None
    except ValueError:
        return True


def module_path() -> dict[str, str]:
    """Return the variables by which workers find classes that a sweep file names."""
    used = [folder for folder in plugins.FOLDERS if folder in sys.path]
    own = {plugins.VARIABLE: os.pathsep.join(used)} if used else {}
    path = os.environ.get("PYTHONPATH")
    return own | ({"PYTHONPATH": path} if path else {})


class _NoFolders(list[str]):
    """Ray puts the driver's working folder and that of its script before the standard library of
    every worker, where any file of a user's would take the place of an installed module.
    """

    def extend(self, folders: object) -> None:
        """Take none."""


def _job_config() -> Any:
    """Return Ray's settings for this driver's workers, whose path is that of Python alone."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _NoFolders()
    return config


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
