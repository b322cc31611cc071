"""Beginning: files to start from, commands in groups, and what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweep.cli import PANELS, app, main
from sweep.cli.common import UserError
from sweep.execution import worker
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.templates import QUESTIONS, text
from tests.support import job

ROOT = Path(__file__).parents[3]
RUNNER = CliRunner()


@pytest.mark.parametrize("template", QUESTIONS)
def test_each_template_is_a_sound_commented_file(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = RUNNER.invoke(app, ["init", "my-sweep.1", "--template", template])

    assert result.exit_code == 0, result.output
    file = Path("my-sweep.1.yaml")
    assert file.read_text(encoding="utf-8").startswith("# ")
    sweep = load(file)
    assert sweep.name == "my-sweep.1"
    assert sweep.table is not None
    assert sweep.spec.claims
    assert not sweep.warnings
    assert not sweep.left_out  # so that it runs anywhere


@pytest.mark.parametrize("template", [name for name in QUESTIONS if name != "quickstart"])
def test_the_first_pack_of_each_template_trains(template: str, tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    short = text(template, "short").replace("steps: 400", "steps: 2")
    file.write_text(short.replace("every: 200", "every: 2").replace("every: 100", "every: 2"))
    ledger = Ledger(tmp_path / "results", write=True)
    pack = plan(file, ledger).packs[0]

    results = worker.run_pack(job(*pack.points), ledger)

    assert {one.status for one in results} == {"done"}


def test_the_quickstart_is_the_one_that_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RUNNER.invoke(app, ["init", "quickstart"]).exit_code == 0

    ours, published = load("quickstart.yaml"), load(ROOT / "experiments/quickstart.yaml")

    assert [point.trial_id for point in ours.all] == [point.trial_id for point in published.all]
    assert ours.spec.model_dump() == published.spec.model_dump()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["taken"], "taken.yaml: is there already"),
        (["My Sweep"], "'My Sweep': a sweep's name is lower-case letters"),
        (["a", "--template", "sise"], "no template is called 'sise'; did you mean 'size'; allowed"),
        (["nowhere/a"], "nowhere/a.yaml"),
        (["x" * 101], "100 at most"),
    ],
)
def test_what_cannot_be_written_is_told_and_nothing_is(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.yaml").write_text("mine")

    result = RUNNER.invoke(app, ["init", *arguments])

    assert isinstance(result.exception, UserError)
    assert told in str(result.exception)
    assert Path("taken.yaml").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.yaml"]


def test_every_command_is_in_one_group() -> None:
    commands = [one.callback.__name__ for one in app.registered_commands if one.callback]
    grouped = [name for names in PANELS.values() for name in names]

    assert sorted(grouped) == sorted(commands)
    assert {one.rich_help_panel for one in app.registered_commands} == set(PANELS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_templates(shell: str) -> None:
    assert callable(main)

    def complete(line: str) -> str:
        words = {"bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}}.get(
            shell, {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        )
        return subprocess.run(
            [sys.executable, "-c", "from sweep.cli import app; app(prog_name='sweep')"],
            env=os.environ | words | {"_SWEEP_COMPLETE": f"complete_{shell}"},
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    assert "validate" in complete("sweep val")
    assert "what-trains" in complete("sweep init a --template wh")
