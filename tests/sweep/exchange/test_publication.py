"""Publications: a folder for a repository, from which its table and its ledger follow again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import sweep as package
from sweep.analysis.history import register
from sweep.exchange.bundle import opened
from sweep.exchange.diff import diff
from sweep.exchange.merging import merge
from sweep.exchange.publication import PublicationError, publish
from sweep.ledger.ledger import Ledger
from sweep.planning.tuning import resolve
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point, Sweep
from tests.support import failure_row, trial_row

OTHER = "0" * 12
"""A trial of no sweep here."""

FILE = """\
sweep: made-known
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
axes:
  pretraining: [random]
  task: [bit-xor, {name: bit-xor, label: longer, bits: 8}]
  arm: [{label: plain, dropout: 0}, {label: dropped, dropout: 0.1}]
  seed: [0, 1, 2]
tune: {learning_rate: {values: [0.001, 0.01]}, seeds: [100]}
table: {rows: arm, columns: task}
claims: [{that: plain > dropped, axis: arm, per: task}]
"""


def fill(sweep: Sweep, ledger: Ledger, *, but: int = 0) -> None:
    """End all trials of a sweep, tuning first, but for the last ones; one has failed before."""
    register(sweep, ledger)
    ledger.fail(failure_row(sweep.tunings[0]))
    for point in sweep.tunings:
        end(point, ledger)
    points = resolve(sweep, ledger).points
    for point in points[: len(points) - but]:
        end(point, ledger)


def end(point: Point, ledger: Ledger) -> None:
    """Commit a row and a curve in two pieces that overlap; its figures follow from its id."""
    for segment, steps in enumerate(((2,), (2, 4))):
        curve = [
            {"step": step, "split": split, "loss": 1 / (step + segment), "accuracy": 0.5}
            for step in steps
            for split in ("train", "validation")
        ]
        ledger.append_curve(point.trial_id, "a1", segment, curve)
    accuracy = 0.5 + int(point.trial_id, 16) % 12 / 30
    ledger.commit(trial_row(point, test_accuracy=accuracy, validation_accuracy=accuracy))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep file, its ledger and its publication; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "made-known.yaml").write_text(FILE)
    sweep, ledger = load(folder / "made-known.yaml"), Ledger(folder / "results", write=True)
    fill(sweep, ledger)
    ledger.commit(trial_row(sweep.tunings[0], trial_id=OTHER))
    publish(sweep, ledger, folder / "published")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "work")


@pytest.fixture
def sweep(work: Path) -> Sweep:
    return load(work / "made-known.yaml")


@pytest.fixture
def ledger(work: Path) -> Ledger:
    return Ledger(work / "results", write=True)


def rows_of(ledger: Ledger, ids: set[str]) -> dict[str, Any]:
    return {
        "trials": ledger.trials(ids),
        "curves": ledger.curves(ids).drop_columns(["attempt", "segment"]),
        "failures": ledger.failures(ids),
    }


def test_a_published_folder_is_the_ledger_again(sweep: Sweep, ledger: Ledger, work: Path) -> None:
    ids = ledger.done() - {OTHER}

    merged = merge([work / "published"], work / "again")

    again = Ledger(work / "again")
    assert merged.trials == len(ids)
    assert rows_of(again, ids) == rows_of(ledger, ids)
    assert {name: again.copy(name) for name in again.notes.names()} == {
        name: ledger.copy(name) for name in ledger.notes.names()
    }
    assert len(ledger.notes.names()) == 2  # the claims before the first row, and their reading
    assert set(package.plan(sweep, again).status.values()) == {"done"}
    back = merge([work / "published"], work / "results")
    assert (back.trials, back.present) == (0, len(ids))


def test_texts_and_figures_follow_from_the_rows(sweep: Sweep, work: Path) -> None:
    folder, twice = work / "published", work / "twice"
    merge([folder], work / "again")

    written = publish(sweep, Ledger(work / "again"), twice, report=True)

    names = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    assert {Path("table.md"), Path("claims.csv"), Path("figures/curves.svg")} < names
    for name in names - {Path("curves.parquet")}:  # pieces of it are put together
        assert (folder / name).read_bytes() == (twice / name).read_bytes(), name
    assert "made-known" in (twice / "report.html").read_text()
    assert written.size == sum(file.stat().st_size for file in twice.rglob("*") if file.is_file())
    table = package.load_table(sweep.file, work / "again")
    assert (folder / "table.md").read_text() == table.to_markdown()


def test_a_second_publication_replaces_the_first(sweep: Sweep, ledger: Ledger, work: Path) -> None:
    folder = work / "published"
    (folder / "figures/of-yesterday.svg").touch()
    ledger.remove("failures")

    publish(sweep, ledger, folder)

    assert not (folder / "figures/of-yesterday.svg").exists()
    assert not (folder / "failures.parquet").exists()


def test_what_has_not_ended_is_not_published(sweep: Sweep, work: Path) -> None:
    ledger = Ledger(work / "unfinished", write=True)
    fill(sweep, ledger, but=1)

    with pytest.raises(PublicationError, match=r"1 of 20 trials have no row.*sweep run .*\.yaml"):
        publish(sweep, ledger, work / "too-early")

    assert not (work / "too-early").exists()


def test_diff_reads_a_published_folder(sweep: Sweep, ledger: Ledger, work: Path) -> None:
    some = sweep.tunings[0].trial_id
    row = ledger.trials([some]).to_pylist()[0]
    ledger.recommit(row | {"test_loss": row["test_loss"] + 1e-9})

    with opened(work / "published") as published:
        found = diff(sweep, published, ledger)

    assert [one.trial_id for one in found.clashes] == [some]


@pytest.mark.parametrize("damage", ["cut", "no number", "foreign", "name", "notes"])
def test_a_damaged_publication_is_refused_in_words(damage: str, work: Path) -> None:
    folder = work / "published"
    file = folder / "trials.parquet"
    rows = pq.read_table(file)
    at = rows.column_names.index
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "no number":
        texts = [["high"] * rows.num_rows]
        pq.write_table(rows.set_column(at("test_loss"), "test_loss", texts), file)
    elif damage == "foreign":
        pq.write_table(rows.append_column("mood", [["good"] * rows.num_rows]), file)
    elif damage == "name":
        names = [["../../etc/x"] * rows.num_rows]
        pq.write_table(rows.set_column(at("trial_id"), "trial_id", names), file)
    else:
        (folder / "notes.json").write_text('{"../escape.json": {}}')

    with pytest.raises(PublicationError, match=r"published: no publication, or damaged"):
        merge([folder], work / "again")

    assert not Ledger(work / "again").done()


def test_a_folder_without_rows_is_no_publication(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(__file__, tmp_path / "empty/notes.json")

    with pytest.raises(Exception, match="no ledger"), opened(tmp_path / "empty"):
        pass
