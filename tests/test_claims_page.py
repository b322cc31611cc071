"""What docs/claims.md and docs/tuning.md say is so: their code runs, their commands work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweep.cli import app

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


def test_its_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8")
    Path("experiments/quickstart.yaml").write_text(source)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks("sh") for line in block.splitlines()]

    assert len(lines) == 2
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == "sweep"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output


def test_its_claims_are_valid(tmp_path: Path) -> None:
    from sweep.sweepfile.expansion import load

    source = (ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8")
    head = source[: source.index("claims:")]
    written = blocks("yaml")
    assert len(written) == 2
    for number, block in enumerate(written):
        file = tmp_path / f"{number}.yaml"
        file.write_text(head + block)
        assert load(file).spec.claims


def test_the_page_of_tuning_shows_a_file_and_a_command_that_work(tmp_path: Path) -> None:
    from sweep.sweepfile.expansion import load

    (tune,) = blocks("yaml", TUNING)
    file = tmp_path / "tuned.yaml"
    file.write_text(
        "sweep: tuned\ntrial: {task: digits, steps: 9, backbone: {name: gpt2, size: tiny}}\n"
        f"axes: {{pretraining: [language, random], seed: [0, 1]}}\n{tune}"
    )
    sweep = load(file)
    assert len(sweep.tunings) == 12  # half of twelve points, for two cells
    (command,) = blocks("sh", TUNING)
    name, *arguments = shlex.split(command)
    arguments = [str(ROOT / one) if one.startswith("experiments") else one for one in arguments]
    results = ["--results", str(tmp_path / "results")]
    done = CliRunner().invoke(app, [*arguments, "--json", *results])
    assert (name, done.exit_code) == ("sweep", 0)
    assert "being tuned (0 of 12 points)" in done.stdout
    assert CliRunner().invoke(app, [*arguments, *results]).exit_code == 0
