"""What code prints in a worker: where it goes, how much is kept, and debuggers."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sweep import cli
from sweep.execution import output
from sweep.execution.output import BreakpointError, recorded
from sweep.execution.worker import run_pack
from sweep.ledger.ledger import Ledger
from tests.support import Watching, job
from tests.sweep.execution.test_worker import StandIn, point


def test_prints_and_logging_are_kept_whoever_makes_them() -> None:
    logger = logging.getLogger("someone.s.task")
    with recorded("label") as log:
        handler = logging.StreamHandler()  # as `logging.basicConfig` makes one
        logger.addHandler(handler)
        print("from the task")  # noqa: T201
        logger.warning("from a logger")
        thread = threading.Thread(target=lambda: sys.stderr.write("from a thread\n"))
        thread.start()
        thread.join()
    logger.warning("after the attempt")
    with recorded("label") as later:
        logger.warning("in the next one")  # by the handler of the first
    logger.removeHandler(handler)

    for text in ("from the task", "from a logger", "from a thread"):
        assert text in log.text()
    assert "after" not in log.text()
    assert later.text() == "in the next one\n"


def test_warnings_are_kept() -> None:
    # In a process of its own: pytest takes warnings for itself.
    code = (
        "import warnings\nfrom sweep.execution.output import recorded\n"
        "with recorded('label') as log: warnings.warn('from a library')\n"
        "print(log.text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "UserWarning: from a library" in done.stdout


def test_the_last_of_a_long_log_is_kept() -> None:
    with recorded("label") as log:
        for number in range(60_000):
            print("line", number)  # noqa: T201

    text = log.text()
    assert output.KEPT <= len(text) < output.KEPT + 100
    assert text.startswith("... ")
    assert text.endswith("line 59998\nline 59999\n")
    assert log.tail().splitlines() == [f"line {n}" for n in range(59_980, 60_000)]


def test_streams_and_debuggers_are_as_before_whatever_happens() -> None:
    before = sys.stdout, sys.stderr, sys.breakpointhook

    with (
        pytest.raises(BreakpointError, match=r"test_output\.py:\d+: .*--only 'a/b/1'"),
        recorded("a/b/1"),
    ):
        breakpoint()

    assert (sys.stdout, sys.stderr, sys.breakpointhook) == before


def test_a_trials_log_is_in_the_ledger_in_show_and_in_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path / "results")
    trial, quiet = point(0), point(1)

    def train(*trials: Any, **options: Any) -> StandIn:
        print("loss of my own: 0.5")  # noqa: T201
        return StandIn(*trials, **options)

    def raises(_: Any, record: Any) -> None:
        if record.step == 20:
            print("now it comes")  # noqa: T201
            raise ZeroDivisionError

    attempt = job(trial)
    (result,) = run_pack(attempt, ledger, train=train, reporter=Watching(raises))
    run_pack(job(quiet), ledger, train=StandIn)

    assert result.cause == "code"
    assert ledger.logs(trial.trial_id) == {attempt.attempt: "loss of my own: 0.5\nnow it comes\n"}
    assert ledger.logs(quiet.trial_id) == {}
    (note,) = ledger.failures().to_pylist()
    assert note["traceback"].endswith("printed last:\nloss of my own: 0.5\nnow it comes\n")
    # And how far it got, although no state was saved.
    assert ledger.curves([trial.trial_id]).column("step").to_pylist() == [10, 20]
    monkeypatch.setenv("FPT_SWEEP_RESULTS", ledger.uri)
    told = {}
    for words in (["show", trial.trial_id], ["logs", "--trial", trial.trial_id[:6]], ["logs"]):
        monkeypatch.setattr(
            "sys.argv", ["sweep", *words, *(["--results", ledger.uri] * (len(words) > 1))]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told[words[0], len(words)] = (ended.value.code, *capsys.readouterr())
    code, shown, _ = told["show", 2]
    assert code in (0, None)
    assert "at step 20, cause: code" in shown
    assert "curve, the last 2 of 2 records" in shown
    assert "  now it comes" in shown
    assert told["logs", 3][1] == "loss of my own: 0.5\nnow it comes\n"
    assert told["logs", 1][0] == 2
    assert "--trial ID" in told["logs", 1][2]


def test_a_forgotten_breakpoint_fails_every_trial_of_a_pack_at_once(tmp_path: Path) -> None:
    def train(*_: Any, **__: Any) -> Any:
        breakpoint()

    results = run_pack(job(point(0), point(1)), Ledger(tmp_path), train=train)

    assert [(one.cause, one.undecided) for one in results] == [("code", False)] * 2
    assert all("sweep debug FILE" in (one.message or "") for one in results)
