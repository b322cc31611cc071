"""What two ledgers say differently; and the commands about ledgers, from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sweep.analysis.tables import load_table
from sweep.exchange.diff import FIGURES, Conflict, clash, diff, row_by_row
from sweep.execution.driver import DRIVER
from sweep.ledger.ledger import TRIALS, Ledger
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point, Sweep
from tests.support import Command, failure_row, trial_row

FILE = """\
sweep: compared
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
axes:
  pretraining: [random]
  task: [bit-xor, bit-memory]
  learning_rate: [0.001, 0.01]
  seed: [0, 1, 2]
table: {rows: learning_rate, columns: task}
claims: [{that: "0.01 > 0.001", axis: learning_rate, "on": test_accuracy, per: task}]
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(tmp_path)
    Path("compared.yaml").write_text(FILE)
    return load("compared.yaml")


def accuracy(point: Point) -> float:
    """0.5 and a little by seed; a learning rate of 0.01 gives 0.0625 more."""
    return 0.5 + point.config.seed / 128 + (0.0625 if "0.01" in point.labels.values() else 0)


def fill(sweep: Sweep, folder: str, change: Callable[[Point], Mapping[str, Any] | None]) -> Ledger:
    """A ledger with every trial that `change` says something of."""
    ledger = Ledger(folder, write=True)
    for point in sweep.all:
        columns = change(point)
        if columns is not None:
            ledger.commit(trial_row(point, **{"test_accuracy": accuracy(point), **columns}))
    return ledger


def usual(point: Point) -> dict[str, Any]:
    return {}


# --- diff -----------------------------------------------------------------------------------------


def test_provenance_is_no_difference(sweep: Sweep) -> None:
    one = fill(sweep, "one", lambda point: {"test_loss": float("nan")})
    other = fill(
        sweep,
        "other",
        lambda point: {
            "test_loss": float("nan"), "host": "other", "seconds": 99.0, "git_commit": "1" * 40,
            "attempts": 3, "pack_size": 8, "attempt": "z",
        },
    )  # fmt: skip

    found = diff(sweep, one, other)

    assert found.same
    assert found.unchanged == 4
    assert found.record()["cells_unchanged"] == 4


def test_cells_come_go_and_change(sweep: Sweep) -> None:
    def some(*cells: tuple[str, str], seeds: int = 3) -> Callable[[Point], dict[str, Any] | None]:
        def change(point: Point) -> dict[str, Any] | None:
            here = (point.labels["learning_rate"], point.labels["task"])
            return {} if here in cells and point.config.seed < seeds else None

        return change

    one = fill(sweep, "one", some(("0.001", "bit-xor"), ("0.01", "bit-xor"), seeds=2))
    other = fill(sweep, "other", some(("0.001", "bit-xor"), ("0.01", "bit-memory")))

    found = diff(sweep, one, other)

    told = {(cell.after.row, cell.after.column): cell.record() for cell in found.cells}
    assert {place: cell["what"] for place, cell in told.items()} == {
        ("0.001", "bit-xor"): "changed",
        ("0.01", "bit-xor"): "removed",
        ("0.01", "bit-memory"): "added",
    }
    before, after = (told["0.001", "bit-xor"][when] for when in ("before", "after"))
    assert (before["n"], after["n"]) == (2, 3)
    assert before["mean"] == pytest.approx(100 * (0.5 + 0.5 / 128))
    assert after["mean"] == pytest.approx(100 * (0.5 + 1 / 128))
    assert found.unchanged == 1
    assert (len(found.added), len(found.removed)) == (4, 2)
    assert found.clashes == ()
    turned = diff(sweep, other, one)
    assert turned.added == found.removed


def test_contradictions_come_first(sweep: Sweep) -> None:
    first, second, third = sweep.all[:3]
    one = fill(sweep, "one", usual)
    changes: dict[str, dict[str, Any]] = {
        first.trial_id: {"train_loss": 0.75, "device": "cuda"},
        second.trial_id: {"validation_loss": 0.5000000000000001},
        third.trial_id: {"test_loss": -0.0},
    }
    other = fill(sweep, "other", lambda point: changes.get(point.trial_id, {}))

    found = diff(sweep, one, other)

    assert [c.trial_id for c in found.clashes] == [second.trial_id, third.trial_id, first.trial_id]
    assert [c.excuse for c in found.clashes] == ["", "", "device cpu and cuda"]
    assert found.clashes[0].columns == {"validation_loss": (0.5, 0.5000000000000001)}
    assert str(found.clashes[2]) == (
        f"trial {first.trial_id}: train_loss 0.25 and 0.75 (device cpu and cuda)"
    )
    # No cell of the table shows any of that.
    assert found.cells == ()
    assert not found.same


def test_a_row_from_before_the_stronger_baseline_contradicts_none_after_it(sweep: Sweep) -> None:
    point = sweep.all[0]
    rows = (trial_row(point, stronger_baseline_accuracy=found) for found in (None, 0.47))

    assert clash(*rows) is None


@pytest.mark.parametrize(
    ("device", "packs", "excuse"),
    [
        ("cuda", (1, 4), "packs of 1 and of 4 on cuda"),
        ("cuda", (4, 4), "packs of 4 and of 4 on cuda"),  # the others may have been others
        ("cuda", (1, 1), ""),
        ("cuda", (None, 1), ""),
        ("cpu", (1, 4), ""),
    ],
)
def test_on_a_gpu_figures_may_depend_on_the_pack(
    device: str, packs: tuple[Any, Any], excuse: str, sweep: Sweep
) -> None:
    one, other = (
        trial_row(sweep.all[0], device=device, pack_size=size, test_loss=loss)
        for size, loss in zip(packs, (0.5, 0.5000001), strict=True)
    )

    found = clash(one, other)

    assert found is not None
    assert found.excuse == excuse


def test_a_row_beside_itself_never_clashes_and_each_figure_counts(sweep: Sweep) -> None:
    row = dict.fromkeys(TRIALS.schema.names) | trial_row(sweep.all[0], test_loss=float("nan"))
    assert clash(row, dict(row)) is None
    for name in FIGURES:
        found = clash(row, row | {name: "other" if isinstance(row[name], str) else 17})
        assert found is not None
        assert list(found.columns) == [name]
        assert isinstance(found, Conflict)
        json.dumps(found.record(), allow_nan=False)
    others = set(TRIALS.schema.names) - set(FIGURES)
    assert all(clash(row, row | {name: None}) is None for name in others)


def test_verdicts_that_flip(sweep: Sweep) -> None:
    one = fill(sweep, "one", usual)
    other = fill(
        sweep,
        "other",
        lambda p: {"test_accuracy": 0.5 + p.config.seed / 16} if "bit-xor" in p.label else {},
    )

    (flip,) = diff(sweep, one, other).flips

    assert flip.place == {"task": "bit-xor"}
    assert flip.before == "supported"
    assert flip.after != "supported"
    assert diff(sweep, one, other, claims=False).flips == ()


def test_a_sweep_without_a_table_is_compared_by_trials(sweep: Sweep) -> None:
    Path("none.yaml").write_text(FILE[: FILE.index("table:")])
    one, other = fill(sweep, "one", usual), Ledger("other")

    found = diff(load("none.yaml"), one, other)

    assert (len(found.removed), found.cells, found.same) == (12, (), False)


# --- row by row -----------------------------------------------------------------------------------


def test_each_row_is_equal_explained_different_or_missing(sweep: Sweep, command: Command) -> None:
    """Seeds of a cell lie 2/128 apart at most: so far may another processor move a trial."""
    a, b, c, d, e, *_ = sweep.points
    changes: dict[str, dict[str, Any] | None] = {
        a.trial_id: {"test_loss": 0.5000001, "device_name": "another"},
        b.trial_id: {"test_accuracy": accuracy(b) + 2 / 128, "device_name": "another"},
        c.trial_id: {"test_accuracy": accuracy(c) + 3 / 128, "device_name": "another"},
        d.trial_id: {"test_loss": 0.5000001},
        e.trial_id: None,
    }
    one = fill(sweep, "one", usual)
    other = fill(sweep, "other", lambda point: changes.get(point.trial_id, {}))

    matches = {match.trial_id: match for match in row_by_row(sweep, one, other)}

    states = [matches[point.trial_id].state for point in sweep.points]
    assert states == ["explained"] * 2 + ["differs"] * 2 + ["missing"] + ["equal"] * 7
    assert "device name" in matches[a.trial_id].why
    code, out, _ = command("diff", "one", "other", "compared.yaml", "--rows")
    assert code == 1
    assert out.splitlines()[-1] == "rows: 7 equal, 2 explained, 2 differs, 1 missing"


@pytest.mark.parametrize("device", ["the same", "another"])
def test_rows_that_are_equal_or_explained_are_reproduced(
    device: str, sweep: Sweep, command: Command
) -> None:
    fill(sweep, "one", usual)
    moved = {"test_loss": 0.5000001, "device_name": device} if device == "another" else {}
    fill(sweep, "other", lambda _: moved)

    code, out, _ = command("diff", "one", "other", "compared.yaml", "--rows", "--json")

    counts = json.loads(out)["counts"]
    state = "explained" if moved else "equal"
    assert code == 0
    assert counts == {"equal": 0, "explained": 0, "differs": 0, "missing": 0, state: 12}


# --- commands -------------------------------------------------------------------------------------


def test_diff_exits_by_what_it_finds(sweep: Sweep, command: Command) -> None:
    one = fill(sweep, "one", usual)
    shutil.copytree("one", "other")
    code, out, _ = command("diff", "one", "other", "compared.yaml")
    assert (code, out) == (0, "no difference: 4 cells, 12 trials\n")

    point = sweep.all[0]
    Path(f"other/trials/{point.trial_id}.parquet").unlink()
    Ledger("other").commit(trial_row(point, test_accuracy=0.125, device_name="B"))
    code, out, _ = command("diff", "one", "other", "compared.yaml")
    assert code == 1
    assert f"trial {point.trial_id}: test_accuracy 0.5 and 0.125 (device name a processor" in out
    assert re.search(r"changed: 0\.001 / bit-xor / test_accuracy: 50\.78.* -> 38\.28", out)

    code, out, _ = command("diff", "one", "other", "compared.yaml", "--only", "*/bit-memory/*")
    assert (code, out) == (0, "no difference: 2 cells, 6 trials\n")
    code, out, _ = command("diff", "one", "other", "compared.yaml", "--json")
    assert code == 1
    assert json.loads(out)["contradictions"][0]["label"] == point.label
    assert one.local is not None


def test_mistakes_are_messages(sweep: Sweep, command: Command) -> None:
    fill(sweep, "one", usual)
    for argv, said in [
        (("diff", "one", "othr", "compared.yaml"), "othr: no ledger"),
        (
            ("trace", "compared.yaml", "0.02", "bit-xor", "--results", "one"),
            "no row '0.02'; did you mean '0.01'",
        ),
        (("export", "compared.yaml", "-o", "bundle", "--results", "one"), "ends in .zip"),
        (("merge", "nowhere", "--into", "mine"), "nowhere: no ledger"),
        (("upgrade", "one", "--into", "one", "--json"), "is the old ledger itself"),
        (("plan", "compared.yaml", "--only", "nope"), "no trial matches 'nope'"),
        (("run", "compared.yaml", "--only", "nope"), "no trial matches 'nope'"),
    ]:
        code, _, err = command(*argv)
        assert (code, "Traceback" in err) == (2, False)
        assert said in err
    assert sorted(path.name for path in Path().iterdir()) == ["compared.yaml", "one"]


def test_trace_is_told_and_written_as_json(sweep: Sweep, command: Command) -> None:
    ledger = fill(sweep, "results", usual)
    point = next(one for one in sweep.all if one.label == "random/bit-xor/0.01/1")
    ledger.fail(failure_row(point, cause="worker", message="killed\nby somebody"))

    code, out, _ = command("trace", "compared.yaml", "0.01", "bit-xor")
    assert code == 0
    assert "0.01 / bit-xor / test_accuracy: done, 3 of 3 trials" in out
    assert re.search(rf"{point.trial_id} +random/bit-xor/0.01/1 +done +57\.03125 ", out)
    assert re.search(r"learning_rate +0\.01$", out, flags=re.MULTILINE)
    assert f"failed: {point.trial_id} at step 10 on host" in out
    assert "worker: OverflowError: killed\n" in out
    assert "--results results-again" in out
    code, out, _ = command("trace", "compared.yaml", "0.01", "bit-xor", "--json")
    assert json.loads(out)["cell"]["trials"][1] == point.trial_id


def test_plan_of_a_part(sweep: Sweep, command: Command) -> None:
    code, out, _ = command("plan", "compared.yaml", "--only", "*/bit-xor/0.01/*", "--json")
    assert code == 0
    labels = [trial["label"] for trial in json.loads(out)["trials"]]
    assert labels == [f"random/bit-xor/0.01/{seed}" for seed in range(3)]


@pytest.mark.parametrize("verb", ["merge", "upgrade"])
def test_a_run_under_way_is_not_written_into(verb: str, sweep: Sweep, command: Command) -> None:
    fill(sweep, "one", usual)
    lease = Ledger("mine", write=True).lease(f"{DRIVER}here")
    assert lease is not None
    with lease:
        code, _, err = command(verb, "one", "--into", "mine")
    assert code == 2
    assert "a run is under way" in err
    assert not Ledger("mine").done()


def test_from_export_to_a_table_without_torch_ray_or_mlflow(sweep: Sweep) -> None:
    fill(sweep, "results", usual)
    script = """
import sys
from sweep import cli

for line in sys.stdin:
    sys.argv = ["sweep", *line.split()]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, line
heavy = {"torch", "ray", "mlflow", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    lines = [
        "trace compared.yaml 0.01 bit-xor",
        "export compared.yaml -o bundle.zip",
        "merge bundle.zip --into merged",
        "upgrade merged --into upgraded",
        "diff results upgraded compared.yaml",
        "plan compared.yaml --only */bit-xor/* --results upgraded",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "12 of 12 trials" in done.stderr
    assert "finished trials: 12 copied" in done.stderr
    assert "no difference: 4 cells, 12 trials" in done.stdout
    table = load_table("compared.yaml", "upgraded")
    assert table.to_markdown() == load_table("compared.yaml").to_markdown()
