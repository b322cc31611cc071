"""The command line: what goes where, what it exits with, and how it says no."""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pandas
import pytest
import typer
from rich.console import Console

from sweep import cli
from sweep.cli import progress
from sweep.execution import driver
from sweep.ledger.causes import Cause
from sweep.ledger.ledger import Ledger, new_attempt
from sweep.planning.packing import Workers
from sweep.sweepfile.expansion import load
from tests.support import Command, failure_row, job, trial_row

TINY = """\
sweep: tiny
description: Whether two seeds agree.
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
axes:
  pretraining: [random]
  task: [{name: bit-xor, bits: 2}]
  seed: [0, 1]
table: {rows: pretraining, columns: task}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = Path("tiny.yaml")
    path.write_text(TINY)
    return path


COMMANDS = sorted(c.callback.__name__ for c in cli.app.registered_commands if c.callback)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name: str, command: Command) -> None:
    (registered,) = (c for c in cli.app.registered_commands if c.callback.__name__ == name)
    example = re.match(r"Example: (sweep .*)", registered.epilog or "")

    assert registered.callback.__doc__
    assert example is not None
    # The options of the example exist: parsed, not run.
    parser = typer.main.get_command(cli.app).commands[name]
    argv = shlex.split(example[1].split(" > ")[0])
    assert argv[:2] == ["sweep", name]
    parser.make_context(name, argv[2:])
    assert example[1].split()[-1] in command(name, "--help").out


def test_validate_tells_every_problem_of_every_file(file: Path, command: Command) -> None:
    Path("broken.yaml").write_text(TINY.replace("steps: 4", "stepz: 4").replace("bit-xor", "xor"))

    result = command("validate", "broken.yaml", file, "absent.yaml")

    assert result.code == 2
    assert result.out.startswith("tiny.yaml: 2 trials")
    assert "broken.yaml:6: " in result.err
    assert "stepz" in result.err
    assert "xor" in result.err
    assert "absent.yaml" in result.err
    assert re.search(r"^\d problems\.$", result.err, flags=re.MULTILINE)
    assert "Traceback" not in result.err


def test_plan_lists_trials_and_counts(file: Path, command: Command) -> None:
    result = command("plan", file)

    assert result.code == 0
    assert result.out.count("missing") == 3
    assert "random/bit-xor/1" in result.out
    assert "tiny: 2 trials: 2 missing" in result.out
    assert not Path("results").exists()


def test_plan_says_what_trains_side_by_side(
    file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "here", lambda: Workers(1))
    seeds = TINY.replace("[0, 1]", "[0, 1, 2]")
    file.write_text(seeds)
    drawn = command("plan", file).out
    seeds = seeds.replace("batch_size: 4", "batch_size: 48")
    file.write_text(seeds)
    apart = command("plan", file).out
    file.write_text(seeds.replace("steps: 4", "steps: 4\n  backbone_seed: 7"))
    packed = command("plan", file).out
    file.write_text(f"{seeds}pack: off\n")
    off = command("plan", file).out

    # Seeds that draw a backbone each pack too, but of many rows they gain too little.
    for one in (drawn, packed):
        assert "to run: 3 trials in 1 pack (1 of 3), on this machine 1 at a time" in one
        assert "of the time in training (estimated)" in one
        assert "alone, since" not in one
    assert "to run: 3 trials in 3 packs (3 alone)" in apart
    assert "3 trials alone, since each seed draws a backbone of its own" in apart
    assert "alone, since" not in off


def test_plan_of_several_files_counts_shared_trials_once(file: Path, command: Command) -> None:
    other = file.with_name("other.yaml")
    other.write_text(TINY.replace("sweep: tiny", "sweep: other").replace("[0, 1]", "[1, 2, 3]"))
    Ledger("results", write=True).commit(trial_row(load(file).points[1]))

    said = command("plan", file, other)
    planned = json.loads(command("plan", file, other, "--json").out)

    assert said.code == 0
    assert re.search(r"tiny.yaml +1 done, 1 missing +about ", said.out)
    assert re.search(r"other.yaml +1 done, 2 missing +about ", said.out)
    shared = "2 files: 4 trials (and 1 again, which are counted once): 1 done, 3 missing"
    assert shared in said.out
    assert said.out.count("price: about") == 1
    assert [one["sweep"] for one in planned["files"]] == ["tiny", "other"]
    total = planned["total"]
    assert (total["trials"], total["shared"]) == (4, 1)
    assert (total["counts"]["done"], total["counts"]["missing"]) == (1, 3)
    apart = sum(one["quote"]["hours"] for one in planned["files"])
    assert total["quote"]["hours"] == pytest.approx(apart)  # What is shared is done.
    once = json.loads(command("plan", file, file, "--json").out)
    assert once["total"]["quote"]["hours"] == once["files"][0]["quote"]["hours"]


def test_what_a_condition_leaves_out_is_told(file: Path, command: Command) -> None:
    excluded = "{seed: 1, missing: ../data/of/mine}, {seed: 0, present: x}"
    file.write_text(f"{TINY}exclude: [{excluded}]\n")
    said = "left out: 1 trial of seed 1: ../data/of/mine is not there"

    validated, planned = command("validate", file), command("plan", file)

    assert said in validated.out
    assert said in planned.out
    assert "1 missing" in planned.out
    assert json.loads(command("plan", file, "--json").out)["left_out"] == [
        {"trials": 1, "pattern": "seed 1", "why": "../data/of/mine is not there"}
    ]


def test_plan_and_status_write_json(file: Path, command: Command) -> None:
    planned = json.loads(command("plan", file, "--json").out)
    status = json.loads(command("status", file, "--json").out)

    assert planned
    assert status["sweep"] == "tiny"
    assert status["trials"]["missing"] == 2


def test_schema_is_a_json_schema(command: Command) -> None:
    schema = json.loads(command("schema").out)

    assert "axes" in json.dumps(schema)


@pytest.mark.parametrize("argv", [["plan"], ["table"], ["run"], ["status"], ["retry"]])
def test_a_broken_file_is_a_message_and_exit_code_2(
    argv: list[str], file: Path, command: Command
) -> None:
    file.write_text("sweep: tiny\nsweep: twice\n")

    result = command(*argv, file)

    assert result.code == 2
    assert result.err.startswith("tiny.yaml:2: ")
    assert "Traceback" not in result.err
    assert result.out == ""
    assert not Path("results").exists()


def test_a_ledger_that_cannot_be_is_a_message(file: Path, command: Command) -> None:
    result = command("plan", file, "--results", "ftp://host/results")

    assert result.code == 2
    assert "ftp://host/results" in result.err
    assert "s3://" in result.err
    assert "Traceback" not in result.err


def test_results_come_from_the_environment(
    file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPT_SWEEP_RESULTS", "ftp://elsewhere")

    assert "ftp://elsewhere" in command("status").err


def test_a_bug_keeps_its_traceback(
    file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("sweep.planning.plan.plan", bug)

    with pytest.raises(KeyError, match="ours"):
        command("plan", file)


def test_show_says_which_trials_there_are(file: Path, command: Command) -> None:
    Ledger("results").commit(trial_row(load(file).points[0]))
    result = command("show", "abcd")

    assert result.code == 2
    assert "no trial begins with 'abcd'" in result.err


def test_an_ambiguous_trial_is_refused_with_candidates() -> None:
    known = {"aa0000000000", "ab0000000000", "ba0000000000"}

    with pytest.raises(cli.common.UserError, match="aa0000000000, ab0000000000; give more"):
        cli.common.whole_id("a", known, "results")
    assert cli.common.whole_id("b", known, "results") == "ba0000000000"


def test_retry_refuses_a_cause_that_never_waits(file: Path, command: Command) -> None:
    result = command("retry", file, "--cause", "memory")

    assert result.code == 2
    assert "allowed: code, data" in result.err


def test_table_goes_to_a_file_or_says_why_not(file: Path, command: Command) -> None:
    assert command("table", file, "--format", "md", "-o", "table.md").code == 0
    refused = command("table", file, "-o", "no/such/folder/table.md")

    assert "random" in Path("table.md").read_text()
    assert refused.code == 2
    assert "no/such/folder/table.md: cannot be written" in refused.err


@pytest.mark.parametrize(
    ("argv", "output"),
    [
        (["report", "tiny.yaml"], "no/such/page.html"),
        (["table", "tiny.yaml", "--json"], "no/such/table.json"),
        (["export", "tiny.yaml"], "no/such/bundle.zip"),
        (["query", "SELECT 1"], "no/such/rows.txt"),
        (["query", "SELECT 1", "--format", "parquet"], "no/such/rows.parquet"),
        (["figures", "tiny.yaml", "--only", "curves"], "tiny.yaml/figures"),
    ],
)
@pytest.mark.usefixtures("ledger")
def test_an_output_that_cannot_be_written_is_told_in_a_line(
    argv: list[str], output: str, command: Command
) -> None:
    result = command(*argv, "-o", output)

    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"{output}: cannot be written (No")
    assert f"there is no folder {Path(output).parent}: make it, or name another" in result.err


def test_a_full_disk_is_told_in_a_line(
    file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)

    for name in ("report", "table"):
        result = command(name, file, "-o", "page")
        assert result.code == 2
        assert result.err == (
            "page: cannot be written (No space left on device); make room there, or name another "
            "place with --output\n"
        )


@pytest.mark.parametrize("hours", ["0", "-1", "nan"])
def test_a_run_without_time_is_refused(hours: str, file: Path, command: Command) -> None:
    result = command("run", file, "--hours", hours)

    assert result.code == 2
    assert result.err.startswith(f"--hours {hours}: no time to run in; give hours above 0")
    assert not Path("results").exists()


@pytest.mark.parametrize("form", ["terminal", "md", "tex", "html", "csv"])
def test_a_table_of_nothing_is_still_a_table(form: str, file: Path, command: Command) -> None:
    result = command("table", file, "--format", form)

    assert result.code == 0
    assert "random" in result.out


# ------------------------------------------------------------------------- with something trained


@pytest.fixture
def ledger(file: Path) -> Ledger:
    """A ledger where the first trial is done and the second failed for want of data."""
    ledger = Ledger("results", write=True)
    done, failed = load(file).points
    ledger.commit(trial_row(done, test_accuracy=0.875))
    ledger.append_curve(done.trial_id, new_attempt(), 0, curve_rows())
    ledger.put_state(done.trial_id, b"state of a finished trial")
    ledger.put_backbone(done.trial_id, b"backbone that nobody needs")
    ledger.fail(
        {
            "trial_id": failed.trial_id,
            "attempt": new_attempt(),
            "cause": "data",
            "exception": "DataError",
            "message": "the dog ate it",
            "traceback": "Traceback of it",
            "config": "{}",
            "host": "here",
            "at": datetime.now(UTC),
        }
    )
    return ledger


def curve_rows() -> list[dict[str, Any]]:
    """Thirty steps of a curve."""
    return [
        {
            "step": step,
            "split": "train",
            "loss": 1 / step,
            "accuracy": step / 30,
            "seconds": 1.0,
            "examples": step,
        }
        for step in range(1, 31)
    ]


def test_show_tells_config_figures_curve_and_failures(
    ledger: Ledger, file: Path, command: Command
) -> None:
    done, failed = load(file).points

    of_done = command("show", done.trial_id[:6])
    of_failed = command("show", failed.trial_id)

    assert of_done.code == of_failed.code == 0
    assert f"trial {done.trial_id}: done" in of_done.out
    assert '"name": "bit-xor"' in of_done.out
    assert re.search(r"test_accuracy +0\.875", of_done.out)
    assert "the last 12 of 30 records" in of_done.out
    assert "step      30 train      loss 0.0333 accuracy 1.0000" in of_done.out
    assert f"trial {failed.trial_id}: not done" in of_failed.out
    assert "cause: data" in of_failed.out
    assert "Traceback of it" in of_failed.out


def test_show_of_a_failed_trial_has_its_curve_and_the_step(
    ledger: Ledger, file: Path, command: Command
) -> None:
    failed = load(file).points[1]
    attempt = new_attempt()
    ledger.append_curve(failed.trial_id, attempt, 0, curve_rows()[:20])
    ledger.fail(failure_row(failed, cause="worker", attempt=attempt, step=20))

    said = command("show", failed.trial_id).out

    assert f"trial {failed.trial_id}: not done" in said
    assert "curve, the last 12 of 20 records" in said
    assert "step      20 train      loss 0.0500 accuracy 0.6667" in said
    assert re.search(r"failed .*, at step 20, cause: worker", said)
    assert re.search(r"failed .*, before its first record, cause: data", said)


@pytest.mark.parametrize("compacted", [False, True])
def test_forget_discards_a_row_and_everybody_says_so(
    ledger: Ledger, file: Path, command: Command, compacted: bool
) -> None:
    done = load(file).points[0]
    if compacted:
        ledger.compact()

    said = command("forget", done.trial_id[:6], "--yes")

    assert (said.code, said.out) == (0, "")
    assert f"trial {done.trial_id} is forgotten" in said.err
    assert "trained on its backbone" not in said.err
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    trials = {t["trial_id"]: t for t in json.loads(command("plan", file, "--json").out)["trials"]}
    assert trials[done.trial_id]["status"] == "missing"
    assert trials[done.trial_id]["why"] == f"forgotten on {today}; to be trained again"
    shown = command("show", done.trial_id).out
    assert f"trial {done.trial_id}: not done" in shown
    assert re.search(rf"forgotten {today} .*: row of attempt \S+", shown)
    assert "curve" not in shown
    assert "failed, by cause: 1 data" in command("status").out
    assert not list(Path("results").rglob(f"*{done.trial_id}.*parquet"))
    again = command("forget", done.trial_id, "--yes")
    assert again.code == 2
    assert "no trial begins with" in again.err

    ledger.commit(trial_row(done, test_accuracy=0.5))

    assert ledger.trials([done.trial_id], columns=["test_accuracy"]).to_pylist() == [
        {"test_accuracy": 0.5}
    ]
    assert "1 done, 1 failed" in command("plan", file).out
    assert f"forgotten {today}" in command("show", done.trial_id).out


def test_forget_asks_first_and_never_beside_a_run(
    ledger: Ledger, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = load(file).points[0].trial_id
    monkeypatch.setattr("sys.stdin", io.StringIO())
    unasked = command("forget", done)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("typer.confirm", lambda question, **how: _declined())
    declined = command("forget", done)
    lease = ledger.lease("driver-one")
    assert lease is not None
    with lease:
        beside = command("forget", done, "--yes")
    unknown = command("forget", "ffffffffffff", "--yes")

    assert (unasked.code, declined.code, beside.code, unknown.code) == (2, 1, 2, 2)
    assert f"Discard the row of trial {done} (bit-xor, done" in unasked.err
    assert "--yes does it" in unasked.err
    assert "a run is under way" in beside.err
    assert ledger.done() == {done}
    assert (ledger.states(), ledger.backbones()) == ({done}, {done})
    assert ledger.last_notes([done]) == {}


def _declined() -> None:
    raise typer.Abort


def test_forget_names_the_trials_that_took_the_backbone(
    ledger: Ledger, file: Path, command: Command
) -> None:
    parent = load(file).points[0].trial_id
    heir = Path("heir.yaml")
    heir.write_text(TINY.replace("pretraining: [random]", f"pretraining: ['trial:{parent}']"))
    heirs = [point.trial_id for point in load(heir).points]
    for point in load(heir).points:
        ledger.commit(trial_row(point))

    said = command("forget", parent, "--yes").err

    assert "2 trials trained on its backbone and kept what they have" in said
    assert all(one in said for one in heirs)
    assert ledger.done() == set(heirs)


def test_plan_and_status_say_what_failed(ledger: Ledger, file: Path, command: Command) -> None:
    planned = command("plan", file).out
    status = command("status", file)
    everything = command("status")

    assert "tiny: 2 trials: 1 done, 1 failed" in planned
    assert "the dog ate it" in re.sub(r"\s+", " ", planned)
    assert "tiny: 1 done, 1 failed" in status.out
    assert "results: 1 done" in everything.out
    assert "failed, by cause: 1 data" in everything.out


@pytest.mark.parametrize("cause", get_args(Cause))
def test_an_attempt_that_was_told_to_end_is_stopped_and_any_other_failed(
    ledger: Ledger, file: Path, command: Command, cause: Cause
) -> None:
    failed = load(file).points[1]
    ledger.reset_failures([failed.trial_id])
    ledger.fail(failure_row(failed, cause=cause, attempt=new_attempt(), at=datetime.now(UTC)))

    said = command("status", file).out

    stopped = cause in ("interrupted", "preempted")
    assert f"  {'stopped' if stopped else 'failed'}, by cause: 1 {cause}\n" in said
    assert ("3 attempts: 1 failed, 1 stopped" if stopped else "3 attempts: 2 failed\n") in said


def test_retry_lets_a_failed_trial_run_again(ledger: Ledger, file: Path, command: Command) -> None:
    failed = load(file).points[1]

    assert "no trial waits" in command("retry", file, "--cause", "code").err
    result = command("retry", file, "--cause", "data")

    assert result.out == f"{failed.trial_id} {failed.label}\n"
    assert "sweep run tiny.yaml" in result.err
    assert "1 done, 1 missing" in command("plan", file).out
    assert "by cause" not in command("status").out
    assert "cause: data" in command("show", failed.trial_id).out


def test_a_mark_of_work_done_twice_hides_no_failure(
    ledger: Ledger, file: Path, command: Command
) -> None:
    # An attempt found a row of somebody else's, and that row was lost since.
    failed = load(file).points[1]
    row = ledger.failures([failed.trial_id]).to_pylist()[0]

    ledger.fail(row | {"attempt": new_attempt(), "cause": "doubled", "at": datetime.now(UTC)})
    causes = cli.common.last_causes(ledger)
    told = command("status").out
    ledger.reset_failures([failed.trial_id])

    assert causes == {failed.trial_id: "data"}
    assert "failed, by cause: 1 data" in told
    assert cli.common.last_causes(ledger) == {}


@pytest.mark.parametrize(
    ("outcome", "options", "code", "said", "unsaid"),
    [
        ({"done": 2}, [], 0, ["the table", "sweep ui", "results/trials"], ["go on", "try again"]),
        ({"done": 2}, ["--no-mirror"], 0, ["the table", "results/trials"], ["sweep ui"]),
        ({"done": 1, "failed": 1}, [], 1, ["sweep retry tiny.yaml", "sweep show"], ["go on"]),
        (
            {"missing": 2, "interrupted": True},
            ["--no-mirror"],
            1,
            ["sweep run tiny.yaml --no-mirror"],
            ["sweep ui"],
        ),
    ],
)
def test_run_ends_with_what_to_do_next(
    outcome: dict[str, Any],
    options: list[str],
    code: int,
    said: list[str],
    unsaid: list[str],
    file: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = {"done": 0, "diverged": 0, "failed": 0, "missing": 0}
    summary = driver.Summary(**nothing | {"interrupted": False, "seconds": 61.0} | outcome)
    monkeypatch.setattr(driver, "run", lambda *_, **__: summary)

    result = command("run", file, *options)

    assert result.code == code
    assert result.out == ""
    assert "in 1 min 1 s" in result.err
    assert "Whether two seeds agree." in result.err
    assert [text for text in said if text not in result.err] == []
    assert [text for text in unsaid if text in result.err] == []


def test_gc_lists_and_removes_nothing_unasked(
    ledger: Ledger, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())

    result = command("gc", file)

    assert result.code == 0
    assert re.search(r"states +1 object ", result.out)
    assert "Remove 1 object of states?" in result.err
    assert ledger.states()
    assert ledger.backbones()


def test_gc_removes_what_nothing_needs(ledger: Ledger, file: Path, command: Command) -> None:
    running = load(file).points[1].trial_id
    ledger.put_state(running, b"state of a trial that is to go on")

    assert command("gc", file, "--yes").code == 0

    assert ledger.states() == {running}
    assert ledger.backbones() == set()
    assert len(ledger.done()) == 1
    assert ledger.curves().num_rows == 30


def test_gc_removes_the_claims_of_killed_runs(ledger: Ledger, file: Path, command: Command) -> None:
    lease = ledger.lease("driver-one")
    assert lease is not None
    ledger.reservations(lease).take([point.trial_id for point in load(file).points])

    assert "a run is under way" in command("gc", "--yes").err
    assert list(Path(ledger.uri).glob("leases/trials/*"))
    lease.release()

    assert "2 claims of runs that were killed removed" in command("gc").err
    assert not list(Path(ledger.uri).glob("leases/trials/*"))


def test_gc_asks_for_runs_again_once_it_was_answered(
    ledger: Ledger, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("plan", file)  # makes the cache
    before = ledger.usage()
    before.pop("leases")

    def answered(question: str, *, err: bool) -> bool:
        assert ledger.lease("driver-meanwhile") is not None
        return True

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("typer.confirm", answered)

    result = command("gc", file)

    assert result.code == 2
    assert "a run is under way; nothing is removed until it has ended" in result.err
    assert before.items() <= ledger.usage().items()


def test_gc_keeps_what_the_files_need(ledger: Ledger, file: Path, command: Command) -> None:
    done = load(file).points[0].trial_id
    heir = TINY.replace("pretraining: [random]", f"pretraining: ['trial:{done}']")
    Path("heir.yaml").write_text(heir.replace("sweep: tiny", "sweep: heir"))
    file.write_text(TINY + "keep: {trained: true}\n")

    assert command("gc", file, "heir.yaml", "--yes").code == 0

    assert ledger.states() == {done}
    assert ledger.backbones() == {done}


def test_gc_keeps_a_backbone_that_a_kept_trained_model_needs(
    ledger: Ledger, file: Path, command: Command
) -> None:
    parent = load(file).points[0].trial_id
    heir = Path("heir.yaml")
    heir.write_text(
        TINY.replace("pretraining: [random]", f"pretraining: ['trial:{parent}']").replace(
            "sweep: tiny", "sweep: heir"
        )
        + "keep: {trained: true}\n"
    )
    for point in load(heir).points:
        ledger.commit(trial_row(point))
        ledger.put_state(point.trial_id, b"trained")

    assert command("gc", file, heir, "--yes").code == 0

    assert ledger.backbones() == {parent}


def test_gc_without_a_file_takes_only_what_is_made_again(
    ledger: Ledger, file: Path, command: Command
) -> None:
    before = ledger.states(), ledger.backbones()

    result = command("gc", "--yes")

    assert result.code == 0
    assert "name sweep files" in result.err
    assert (ledger.states(), ledger.backbones()) == before


def test_a_cluster_that_is_not_there_is_told_at_once(file: Path, command: Command) -> None:
    result = command("run", file, "--address", "127.0.0.1:1")

    assert result.code == 2
    assert "--address 127.0.0.1:1: no Ray answers there" in result.err


def test_an_empty_name_is_no_ledger(command: Command) -> None:
    result = command("status", "--results", "")

    assert result.code == 2
    assert "results: empty" in result.err


def test_table_shows_what_there_is(ledger: Ledger, file: Path, command: Command) -> None:
    assert "87.5" in command("table", file).out
    assert "87.5" in json.dumps(json.loads(command("table", file, "--json").out))


# ---------------------------------------------------------------------------------- the live view


def event(kind: str, **fields: Any) -> Any:
    """An event as the driver makes it."""
    names = ("trial_id", "label", "step", "steps", "split", "loss", "accuracy", "message")
    return SimpleNamespace(kind=kind, **dict.fromkeys(names) | fields)


def a_run(view: progress.View) -> None:
    """One trial ends, one fails, one trains."""
    for trial in "abc":
        view(event("trial_started", trial_id=trial, label=f"[{trial}]/0", steps=10))
    view(event("record", trial_id="a", step=4, split="train", loss=0.5, accuracy=0.75))
    view(event("record", trial_id="a", step=4, split="validation", loss=0.6, accuracy=0.625))
    view(event("trial_done", trial_id="b", label="[b]/0", split="test", loss=0.1, accuracy=1.0))
    view(event("trial_failed", trial_id="c", label="[c]/0", message="no data"))


def test_without_a_terminal_the_view_is_plain_lines() -> None:
    out = io.StringIO()

    with progress.View(Console(file=out), {"a": 10, "b": 10, "c": 10, "d": 10}) as view:
        a_run(view)
        view(event("waiting", message="no free core"))
        view(event("waiting", message="no free core"))

    lines = out.getvalue().splitlines()
    assert lines[0] == "started [a]/0"
    assert "[1/4] done    [b]/0  test loss 0.100 accuracy 1.000" in lines
    assert "[2/4] failed  [c]/0: no data" in lines
    assert lines.count("waiting: no free core") == 1
    # Records are rate limited: the first lines came at once, so none of them is told.
    assert not any("step 4/10" in line for line in lines)


def test_a_quiet_view_has_failures_and_messages_alone() -> None:
    out = io.StringIO()

    with progress.View(Console(file=out), {"a": 10, "b": 10, "c": 10}, quiet=True) as view:
        view(event("waiting", message="no free core"))
        a_run(view)
        view(event("message", message="paused"))

    assert out.getvalue().splitlines() == ["[2/3] failed  [c]/0: no data", "paused"]


def test_quiet_leaves_notes_out_and_results_in(
    ledger: Ledger, file: Path, command: Command, tmp_path: Path
) -> None:
    """Of a ledger with a failed and a finished trial: what each command says with -q and without.

    Warnings and failures are said all the same.
    """
    argvs = [
        ["init", "NEW"],
        ["validate", file],
        ["plan", file],
        ["fetch", file],
        ["retry", file],
        ["pause", file],
        ["table", file, "-o", "NEW.md"],
        ["query", "SELECT count(*) FROM trials", "-o", "NEW.csv"],
        ["report", file, "-o", "NEW.html"],
        ["export", file, "-o", "NEW.zip"],
        ["merge", "results", "--into", "NEW"],
        ["upgrade", "results", "--into", "NEW"],
        ["compact"],
        ["gc"],
        ["mirror", file],
    ]
    text = file.read_text()
    file.write_text(f"{text}claims: [{{that: random > random, axis: pretraining, per: task}}]\n")
    broken = command("validate", file, "--quiet")
    file.write_text(text)
    for kind in ("states", "backbones"):  # No tensors, as a merge would see.
        ledger.remove(kind, {load(file).points[0].trial_id})
    loud, quiet = {}, {}
    for argv in argvs:
        words = [str(word) for word in argv]
        loud[words[0]] = command(*(word.replace("NEW", "loud") for word in words))
        quiet[words[0]] = command(*(word.replace("NEW", "quiet") for word in words), "-q")

    assert [said for said in (*loud.values(), *quiet.values()) if said.code] == []
    assert [name for name, said in loud.items() if not (said.err or said.out)] == []
    left = {name: said.err for name, said in quiet.items() if said.err}
    assert left.keys() == {"pause", "gc"}  # a warning and a question
    assert left["pause"] == "tiny: no driver is running\n"
    assert left["gc"].startswith("Remove ")
    assert broken.code == 2
    assert "'random' is compared with itself" in broken.err
    # Results are those of the loud ones, but for the lists of what was looked at.
    assert quiet["validate"].out == ""
    assert "random/bit-xor/1" not in quiet["plan"].out
    assert "tiny: 2 trials: 1 done, 1 failed" in quiet["plan"].out
    assert quiet["table"].out == loud["table"].out == ""
    assert (tmp_path / "quiet.md").read_text() == (tmp_path / "loud.md").read_text() != ""
    assert [said.err.strip() != "" for said in loud.values()].count(True) >= 10


def test_each_command_with_notes_can_be_quiet() -> None:
    """That a new command calls `note` and takes no --quiet is seen in its code."""
    quiet, noting = set(), set()
    for registered in cli.app.registered_commands:
        assert registered.callback is not None
        name = registered.callback.__name__
        if "quiet" in inspect.signature(registered.callback).parameters:
            quiet.add(name)
        if "note" in registered.callback.__code__.co_names:
            noting.add(name)

    assert noting
    assert noting - quiet == set()


def test_a_narrow_terminal_loses_no_digit_and_no_color_none(
    file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger("results", write=True)
    for point in load(file).points:
        ledger.commit(trial_row(point))
    wide = command("table", file).out
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")

    for argv in (["table", file], ["plan", file], ["status", file], ["--help"]):
        result = command(*argv)
        assert result.code == 0
        colours = re.findall(r"\x1b\[[\d;]*m", result.out)
        assert not [one for one in colours if re.search(r"(?<!\d)(3\d|4\d|9\d)(?!\d)", one)], argv
    narrow = re.sub(r"\x1b\[[\d;]*m|\s", "", command("table", file).out)
    figures = re.findall(r"\d+\.\d+", wide)
    assert figures
    assert all(figure in narrow for figure in figures)


def test_records_are_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    with progress.View(Console(file=out), {"a": 100}) as view:
        view(event("trial_started", trial_id="a", label="a/0"))
        for step in range(1, 51):
            now[0] += 1
            view(event("record", trial_id="a", step=step, split="train", loss=1.0, accuracy=0.5))

    assert len(out.getvalue().splitlines()) == 1 + 50 // int(progress.RECORD_SECONDS)
    assert "[0/1] step 10/100  a  train loss 1.000 accuracy 0.500" in out.getvalue()
    assert view.seconds_to_go() == pytest.approx(50)


def test_steps_of_an_earlier_attempt_are_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    view = progress.View(Console(file=io.StringIO()), {"a": 100})

    view(event("trial_started", trial_id="a", step=80))
    assert view.seconds_to_go() is None
    now[0] = 10.0
    view(event("record", trial_id="a", step=90, split="train", loss=1.0, accuracy=0.5))

    assert view.seconds_to_go() == pytest.approx(10)


def test_on_a_terminal_the_view_has_a_line_for_each_running_trial() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)

    with progress.View(console, {"a": 10, "b": 10, "c": 10}) as view:
        a_run(view)
        console.print(view.render())

    seen = out.getvalue()
    assert "2/3 trials" in seen
    assert "1 failed" in seen
    assert re.search(r"\[a\]/0 +4/10 +0\.500 +0\.750 +0\.625", seen)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.7, "1 min 0 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")],
)
def test_a_span_is_told_in_the_units_of_people(seconds: float, said: str) -> None:
    assert progress.span(seconds) == said


# ---------------------------------------------------------------------------- what needs the models

MAPS = """\
sweep: maps
trial: {backbone: {name: gpt2, layers: 1, width: 16, heads: 2}, pretraining: random, steps: 1}
axes:
  task: [{name: bit-xor, bits: 2}, digits]
  arm:
    - {label: frozen}
    - {label: full, train: all}
    - {label: lstm, backbone: {name: lstm, size: tiny}}
  seed: [0]
"""


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file of which the bit-xor trials are trained, in its own process and without Ray."""
    from sweep.execution.worker import run_pack

    monkeypatch.chdir(tmp_path)
    path = Path("maps.yaml")
    path.write_text(MAPS)
    for point in load(path).points:
        if point.labels["task"] == "bit-xor":
            assert run_pack(job(point), Ledger("results"))[0].status == "done"
    return path


def test_attention_draws_what_was_kept_and_says_what_was_not(
    trained: Path, command: Command
) -> None:
    frozen, full, _ = (p.trial_id for p in load(trained).points[:3])

    result = command("attention", trained, "-o", "figures")

    assert result.code == 1  # the trial that trains everything keeps no tensors
    files = [f"figures/bit-xor-frozen-0-{frozen}.{suffix}" for suffix in ("pdf", "svg", "png")]
    heads = [f"figures/heads.{suffix}" for suffix in ("parquet", "pdf", "svg", "png")]
    assert result.out.splitlines() == files + heads
    assert all(Path(file).stat().st_size for file in files)
    assert "not drawn: 3 trials: task digits" in result.err
    assert "not drawn: 1 trial: backbone lstm has no attention" in result.err
    assert f"the trained tensors of {full} were not kept; write `keep: {{trained" in result.err
    assert f"/results/trials/{full}.parquet" in result.err
    one = command("attention", trained, "-o", "again", "--only", "*/frozen/*")
    assert one.code == 0
    assert Path("again", Path(files[0]).name).read_bytes() == Path(files[0]).read_bytes()
    refused = command("attention", trained, "-o", "maps.yaml/figures", "--only", "*/frozen/*")
    assert refused.code == 2
    assert refused.err.startswith("maps.yaml/figures: cannot be written (Not a directory); ")


def test_attention_of_nothing_is_refused(trained: Path, command: Command) -> None:
    none = command("attention", trained, "-o", "figures", "--only", "*/lstm/*")
    unfinished = command("attention", trained, "-o", "figures", "--results", "elsewhere")
    bucket = command("attention", trained, "-o", "figures", "--results", "s3://bucket/prefix")

    assert none.code == unfinished.code == bucket.code == 2
    assert "no trial could be drawn" in none.err
    assert "is not finished; sweep run maps.yaml" in unfinished.err
    assert "copy trials/, states/ and backbones/" in bucket.err
    assert not Path("figures").exists()


def test_weights_are_told_once_a_backbone_with_counts_for_each_set(
    trained: Path, command: Command
) -> None:
    shown = command("weights", trained)
    told = json.loads(command("weights", trained, "--json").out)

    assert shown.code == 0
    assert [(one["backbone"]["name"], one["trials"]) for one in told] == [("gpt2", 4), ("lstm", 2)]
    gpt2, lstm = told
    assert [one["train"] for one in gpt2["parameters"]] == [
        ["input", "norm", "output", "position"],
        ["attention", "feedforward", "input", "norm", "output", "position"],
    ]
    frozen, full = (one["groups"] for one in gpt2["parameters"])
    # 4 W W + 4 W and 8 W W + 5 W, for W = 16; 5 tensors of W of norms; 4 positions.
    assert frozen["attention"] == {"tensors": 4, "parameters": 1088, "trained": 0}
    assert full["feedforward"] == {"tensors": 4, "parameters": 2128, "trained": 2128}
    assert frozen["norm"]["trained"] == 6 * 16
    assert frozen["position"]["trained"] == 4 * 16
    own = sum(one["number"] for one in gpt2["statistics"])
    assert own == 1088 + 2128 + 6 * 16 + 4 * 16
    assert {one["layer"] for one in lstm["statistics"]} == {0}
    assert "frozen" in shown.out
    assert "1,088" in shown.out
    assert "gpt2 (1 layer of 16, 2 heads), random" in shown.out


def test_weights_of_a_backbone_that_is_not_there_yet(file: Path, command: Command) -> None:
    text = TINY.replace("axes:", "backbones: {own: {task: bit-xor, seed: 0}}\naxes:")
    file.write_text(text.replace("[random]", "[random, own]"))

    result = command("weights", file, "--json")

    assert result.code == 1
    assert "train this backbone (again) first" in result.err
    assert [one["pretraining"] for one in json.loads(result.out)] == ["random"]


# ----------------------------------------------------------------- what a run is told and tells of


def test_pause_marks_a_sweep_until_it_runs_again(
    ledger: Ledger, file: Path, command: Command
) -> None:
    said = command("pause", file).err

    assert "no driver is running" in said
    assert "sweep run tiny.yaml" in said
    assert ledger.notes.paused("tiny")
    assert "paused" in command("status", file).out
    ledger.notes.resume("tiny")
    assert "paused" not in command("status", file).out


@pytest.mark.parametrize("name", ["pause", "retry"])
def test_what_asks_of_a_ledger_makes_none_at_a_mistyped_place(
    name: str, file: Path, tmp_path: Path, command: Command
) -> None:
    result = command(name, file, "--results", tmp_path / "resluts")

    assert result.code == 2
    assert "no ledger: nothing was trained here" in result.err
    assert not (tmp_path / "resluts").exists()


def test_status_says_what_a_driver_does_and_where_the_time_went(
    ledger: Ledger, file: Path, command: Command
) -> None:
    done, failed = load(file).points
    ledger.fail(failure_row(done, cause="worker", attempt="a0", lost=90.0))
    ledger.fail(failure_row(done, cause="doubled", attempt="a9", lost=5.0))
    lease = ledger.lease("driver-here")
    assert lease is not None
    lease.note = {
        "sweep": "the-other",
        "running": {failed.trial_id: {"step": 40, "phase": "training", "seconds": 61}},
        "waiting": 3,
        "elsewhere": [done.trial_id],
        "tries": {failed.trial_id: {"worker": 2}},
    }
    assert lease.renew()

    said = command("status", file).out

    assert "trained in vain for 1 min 35 s: doubled 5 s, worker 1 min 30 s" in said
    assert "1 trial finished more than once; the first row stands" in said
    assert "a driver of the-other runs on" in said
    assert f"    {failed.label}: training, step 40, no step for 1 min 1 s" in said
    assert "    3 trials: no worker has begun yet" in said
    assert "    1 trial: another driver trains them" in said
    assert f"    {failed.label}: failed by worker 2 times, 1 more tries" in said


PRINTS = """\
import fpt
print("noise on import")

class Noisy(fpt.Task):
    def shape(self, protocol):
        print("noise in shape")
        return fpt.Shape(tokens=4, inputs=1, embedded=False, classes=2)
    def identity(self):
        print("noise in identity")
        return super().identity()
    def model_post_init(self, context):
        print("noise in init")
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "FILE", "--json"),
        ("status", "FILE", "--json"),
        ("table", "FILE", "--json"),
        ("table", "FILE", "--format", "csv"),
        ("query", "SELECT count(*) FROM trials", "--sweep", "FILE", "--format", "csv"),
    ],
    ids=" ".join,
)
def test_what_a_class_prints_is_no_part_of_a_result(
    arguments: tuple[str, ...],
    file: Path,
    ledger: Ledger,
    command: Command,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = f"noisy_{abs(hash(arguments)) % 10**8}"
    Path(f"{name}.py").write_text(PRINTS)
    file.write_text(
        f"sweep: noisy\ntrial: {{steps: 10, pretraining: random}}\n"
        f"axes: {{task: ['{name}:Noisy'], seed: [0]}}\ntable: {{rows: seed, columns: task}}\n"
    )
    point = load(file).points[0]
    ledger.commit(trial_row(point, own_code=json.dumps(point.config.own_code)))

    capfd.readouterr()  # What was printed so far was printed here.
    said = command(*(str(file) if one == "FILE" else one for one in arguments))

    assert said.code == 0, said.err
    assert "noise" not in said.out
    assert "noise in shape" in said.err
    if "csv" not in arguments:
        json.loads(said.out)


def test_a_label_that_is_another_trial_now_is_said_to_be_in_the_file(
    ledger: Ledger, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = load(file).points[0].label
    ledger.notes.save_trial_list("tiny", {"0123456789ab": label})
    monkeypatch.setattr(
        "sweep.execution.driver.run", lambda *_, **__: driver.Summary(1, 0, 1, 0, False, 1.0)
    )

    said = command("run", file).err

    assert f"another trial in the file now: {label} (0123456789ab, unfinished)" in said
    assert "no longer in the file" not in said


def test_trials_that_the_file_no_longer_has_are_named_and_kept(
    ledger: Ledger, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"0123456789ab": "old/0", "0123456789cd": "old/1"}
    ledger.notes.save_trial_list("tiny", gone)
    for name in gone:
        ledger.save_state(name, b"state", step=10, attempt="a1")
    monkeypatch.setattr(
        "sweep.execution.driver.run", lambda *_, **__: driver.Summary(1, 0, 1, 0, False, 1.0)
    )

    said = command("run", file).err
    again = command("run", file).err

    assert "no longer in the file: old/0 (0123456789ab, unfinished)" in said
    assert "nothing becomes of them; --prune" in said
    assert "no longer in the file: old/1 (0123456789cd, unfinished)" in again
    assert ledger.states() >= gone.keys()
    assert "2 trials forgotten" in command("run", file, "--prune").err
    assert not ledger.states() & gone.keys()
    assert "no longer" not in command("run", file).err


def test_attention_says_what_each_head_comes_to(trained: Path, command: Command) -> None:
    command("attention", trained, "-o", "figures", "--only", "*/frozen/*")

    heads = pandas.read_parquet("figures/heads.parquet")

    (config,) = {p.config for p in load(trained).points if p.label == "bit-xor/frozen/0"}
    assert len(heads) == config.backbone.layers * config.backbone.heads
    assert set(heads["kind"]) <= {"global average", "metastable", "one pattern"}
    assert heads["share"].between(0, 1).all()
    assert (heads["tokens"] == config.task.shape("sound").tokens).all()
    assert Path("figures/heads.svg").stat().st_size


def test_representations_compares_layers_and_arms_before_and_after(
    trained: Path, command: Command
) -> None:
    result = command(
        "representations", trained, "-o", "figures", "--only", "bit-xor/frozen/*", "--examples", 16
    )

    assert result.code == 0
    rows = pandas.read_parquet("figures/representations.parquet")
    assert result.out.splitlines()[0] == "figures/representations.parquet"
    assert len(result.out.splitlines()) == 4  # one arm: no figure between arms
    (config,) = {p.config for p in load(trained).points if p.label == "bit-xor/frozen/0"}
    states = config.backbone.layers + 1
    assert len(rows) == 3 * states**2
    own = rows[(rows["layer"] == rows["other_layer"]) & (rows["when"] == rows["other_when"])]
    assert own["cka"].to_numpy() == pytest.approx(1)
    assert (rows["examples"] == 16).all()
    both = rows[rows["when"] == rows["other_when"]].set_index(["when", "layer", "other_layer"])
    for (when, one, other), cka in both["cka"].items():
        assert cka == pytest.approx(both["cka"][(when, other, one)])


def test_representations_of_what_is_not_there_is_refused(trained: Path, command: Command) -> None:
    few = command("representations", trained, "-o", "figures", "--examples", 3)
    none = command("representations", trained, "-o", "figures", "--only", "digits/*")

    assert few.code == none.code == 2
    assert "is not finished; sweep run maps.yaml" in none.err
    assert "no trial could be drawn" in none.err


@pytest.mark.parametrize("words", ["table", "claims", "report", "figures -o figures"])
def test_a_mistyped_place_is_no_empty_sweep(words: str, file: Path, command: Command) -> None:
    Ledger("results", write=True).commit(trial_row(load(file).points[0]))

    name, *options = words.split()
    result = command(name, file, *options, "--results", "resluts")

    assert result.code == 2
    assert result.err.startswith("resluts: no ledger")
    assert not Path("resluts").exists()
