"""What docs/quickstart.md and docs/faq.md say is so: what is shared, what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import plan

ROOT = Path(__file__).parents[1]
PAGE, FAQ = (
    (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("quickstart", "faq")
)


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[-1:]
    return str(found)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The quickstart's published rows as a ledger."""
    ledger = Ledger(tmp_path / "results", write=True)
    for row in pq.read_table(ROOT / "results/published/quickstart/trials.parquet").to_pylist():
        ledger.commit({name: v for name, v in row.items() if not name.startswith("axis.")})
    return ledger


def test_its_sweep_shares_six_trials_and_grows_by_six(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "my-sweep.yaml"
    file.write_text(block("yaml"))
    first = plan(file, ledger)
    file.write_text(block("yaml").replace("[language, random]", "[language, random, statistics]"))
    grown = plan(file, ledger)

    assert first.counts() == dict.fromkeys(first.counts(), 0) | {"done": 6, "missing": 6}
    rates = {p.config.learning_rate for p in first.sweep.all if first.status[p.trial_id] == "done"}
    assert rates == {1e-3}
    # Three of the six new ones are of the quickstart as well.
    assert grown.counts() == dict.fromkeys(grown.counts(), 0) | {"done": 9, "missing": 9}


def test_the_claims_that_it_shows_are_printed(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    argv = ["claims", str(ROOT / "experiments/quickstart.yaml"), "--results", ledger.uri]

    done = CliRunner().invoke(app, argv)

    assert done.exit_code == 0, done.output
    printed = {" ".join(line.split()) for line in done.output.splitlines()}
    shown = {" ".join(line.split()) for line in block("text").splitlines()}
    assert len(shown) == 4
    assert shown <= printed


def test_the_messages_that_the_page_explains_are_in_the_code() -> None:
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for package in ("fpt", "sweep")
        for file in (ROOT / package).rglob("*.py")
    )
    explained = re.findall(r"^\| `([^`]+)` \|", FAQ, flags=re.MULTILINE)

    assert len(explained) >= 8
    of_the_shell = {"sweep: command not found"}
    assert {one for one in explained if one not in code} == of_the_shell
