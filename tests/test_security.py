"""What is read is data, what listens listens on loopback, and what is secret is not told."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.cluster import connection

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "fpt").rglob("*.py"), *(ROOT / "sweep").rglob("*.py")])

UNPICKLED = {
    # Tune's own file of an error: written in this process, a moment before, into a folder that is
    # this run's own and that only this user can open (tempfile.mkdtemp); never from the ledger.
    "sweep/execution/tune_adapter.py": {"cloudpickle.load"},
    # The bytes that the line itself has just made of a task, to see that workers can get it.
    "fpt/contract.py": {"pickle.loads"},
}
"""Where something is unpickled all the same, and why that is no hole."""


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    found = set()
    for called, call in calls(file):
        last = called.rpartition(".")[2]
        if last in ("load", "loads") and any(
            part in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
            for part in called.split(".")
        ):
            found.add(called)
        # By value, not by name: what `weights_only=flag` says nobody knows.
        if called == "torch.load":
            kept = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert kept.get("weights_only") == "True", f"{name}:{call.lineno}: torch.load"
        assert called not in ("eval", "exec"), f"{name}:{call.lineno}"
        shell = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("shell")
        assert shell in (None, "False"), f"{name}:{call.lineno}: a shell reads the command"

    assert found == UNPICKLED.get(name, set())


def test_trusted_remote_code_is_nowhere() -> None:
    for file in MODULES:
        assert "trust_remote_code=True" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_x"),
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AZURE_STORAGE_ACCOUNT_KEY", "x"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/x"),
        ("MLFLOW_TRACKING_URI", "https://me:secret@host"),
        ("https_proxy", "http://me:secret@proxy:3128"),
    ],
)
def test_what_may_be_a_secret_is_known(name: str, value: str) -> None:
    assert connection.is_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MLFLOW_TRACKING_URI", "https://host"), ("HF_ENDPOINT", "https://hub"), ("KEYBOARD", "de")],
)
def test_what_is_none_is_let_through(name: str, value: str) -> None:
    assert not connection.is_secret(name, value)


def test_no_secret_stands_in_a_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {
        "HF_TOKEN": "hf_sesame",
        "AWS_SECRET_ACCESS_KEY": "sesame",
        "https_proxy": "http://me:sesame@proxy:3128",
        "MLFLOW_TRACKING_PASSWORD": "sesame",
        "RAY_AUTH_TOKEN": "sesame",
    }
    for name, value in (secret | {"HF_HOME": "/shared/hub"}).items():
        monkeypatch.setenv(name, value)

    passed, forwarded_secrets = connection.runtime_env_vars(), connection.forwarded_secrets()

    assert passed["HF_HOME"] == "/shared/hub"
    assert "sesame" not in str(passed)
    for name in connection.FORWARDED:
        assert not connection.is_secret(name, "")
    # What opens the Hub, the network and buckets reaches workers; what opens MLflow or Ray does not
    # have to.
    assert {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "https_proxy"} <= forwarded_secrets.keys()
    assert not {"MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"} & forwarded_secrets.keys()


def test_variables_of_a_job_are_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray refuses a driver whose runtime environment says what its job's said.
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    job = '{"runtime_env": {"env_vars": {"HF_HOME": "/shared/hub"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)

    assert "HF_HOME" not in connection.runtime_env_vars()


def test_a_refused_token_is_not_told(tmp_path: Path) -> None:
    # A real client against a server that refuses everybody.
    server = """
import http.server, threading, sys
class Refuse(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403); self.end_headers()
        self.wfile.write(("Forbidden: " + self.headers["Authorization"]).encode())
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.argv = ["sweep", "logs", "job", "--address", f"http://127.0.0.1:{server.server_port}"]
from sweep.cli import main
main()
"""
    (tmp_path / "token").write_text("open-sesame-0123456789abcdef")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}

    done = subprocess.run(
        [sys.executable, "-c", server],
        env=environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )

    assert done.returncode == 2, done.stderr
    assert "asks for a token" in done.stderr
    assert "sesame" not in done.stdout + done.stderr


def test_servers_that_we_start_listen_on_loopback() -> None:
    from sweep.ledger.ledger import Ledger
    from sweep.mirrors.mlflow_ui import ui_command

    command = ui_command(Ledger("results"))

    assert command[command.index("--host") + 1] == "127.0.0.1"
