"""What docs/claims.md says is so: its code runs, its commands work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweep.cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/claims.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_its_code_runs_and_its_assertions_hold(code: str) -> None:
    assert "assert " in code
    exec(compile(code, "docs/claims.md", "exec"), {})


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
