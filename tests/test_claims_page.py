"""What docs/claims.md and docs/tuning.md say is so: their code runs, their commands work."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sweep.analysis import history
from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.support import trial_row

ROOT = Path(__file__).parents[1]
CLAIMS, TUNING = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("claims.md", "tuning.md")
)


def blocks(language: str, page: str = CLAIMS) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python") + blocks("python", TUNING))
def test_its_code_runs_and_its_assertions_hold(code: str) -> None:
    assert "assert " in code
    exec(compile(code, "docs", "exec"), {})


def test_its_commands_give_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in (("COLUMNS", "400"), ("LINES", "50"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    source = (ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8")
    Path("experiments/quickstart.yaml").write_text(source)
    # A ledger as a run of the quickstart leaves it: its claims are noted before the first row.
    ledger = Ledger("results", write=True)
    history.register(load("experiments/quickstart.yaml"), ledger)
    for row in pq.read_table(ROOT / "results/published/quickstart/trials.parquet").to_pylist():
        ledger.commit({name: v for name, v in row.items() if not name.startswith("axis.")})
    told = re.findall(r"^```(sh|text)\n(.*?)^```", CLAIMS, flags=re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in told] == ["sh", *["sh", "text"] * 3]

    shown = ""
    for kind, block in told:
        for line in block.splitlines():
            if kind == "text":
                assert line in shown
                for plan in re.findall(r"looks: \[([\d, ]+)\]", shown):
                    looks = [int(look) for look in plan.split(", ")]
                    assert looks == sorted(set(looks))
            elif line.startswith("sweep "):
                done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
                assert done.exit_code == 0, done.output
                shown = "\n".join(" ".join(each.split()) for each in done.output.splitlines())
            else:
                subprocess.run(["bash", "-c", line], check=True)


def test_its_claims_are_valid(tmp_path: Path) -> None:
    source = (ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8")
    head = source[: source.index("claims:")]
    written = blocks("yaml")
    assert len(written) == 2
    for number, block in enumerate(written):
        file = tmp_path / f"{number}.yaml"
        file.write_text(head + block)
        assert load(file).spec.claims


def test_the_page_of_tuning_shows_a_file_and_a_command_that_work(tmp_path: Path) -> None:
    known = {}
    for number, tune in enumerate(blocks("yaml", TUNING)):
        file = tmp_path / f"tuned-{number}.yaml"
        file.write_text(
            "sweep: tuned\ntrial: {task: digits, steps: 9, backbone: {name: gpt2, size: tiny}}\n"
            f"axes: {{pretraining: [language, random], seed: [0, 1]}}\n{tune}"
        )
        known[number] = len(load(file).tunings)
    assert known == {0: 12, 1: 24}  # half of twelve points, or all, for two cells
    (command,) = blocks("sh", TUNING)
    name, *arguments = shlex.split(command)
    arguments = [str(ROOT / one) if one.startswith("experiments") else one for one in arguments]
    results = ["--results", str(tmp_path / "results")]
    # Of another file: a place without any ledger is refused.
    Ledger(tmp_path / "results", write=True).commit(trial_row(load(file).tunings[0]))
    done = CliRunner().invoke(app, [*arguments, "--json", *results])
    assert (name, done.exit_code) == ("sweep", 0)
    assert "being tuned (0 of 12 points)" in done.stdout
    assert CliRunner().invoke(app, [*arguments, *results]).exit_code == 0
