"""The sweep files that ship: all there, all sound, and each what its header says it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sweep
from fpt import TrialConfig
from fpt.flops import training_flops
from fpt.published import ACCURACY, references
from sweep.analysis.cells import Cell, grid
from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").rglob("*.yaml"))
PAPER = [file for file in FILES if file.parent.name == "paper"]
LAPTOP = [file for file in FILES if file.parent.name == "laptop"]
TABLES = (*(f"T{number}" for number in range(1, 23)), "R1")

NUMBER = {"one": 1, "two": 2}
REPEATS = {"T19": "T15"}
"""A table that repeats another one has that one's figures."""


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def table_of(file: Path) -> str:
    """T7 of t07-overfitting.yaml."""
    prefix = file.stem.partition("-")[0].upper()
    return prefix[0] + prefix[1:].lstrip("0")


def field(file: Path, key: str) -> str:
    """What the header says behind a key."""
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"^#   {key} +(.*(?:\n# {{12}}.*)*)$", text, re.MULTILINE)
    assert found, f"the header has no line {key!r}"
    return re.sub(r"\n# +", " ", found[1])


def needs_something(config: TrialConfig) -> bool:
    """Whether a trial needs a folder of data or a package that may not be there."""
    weights = config.backbone.weights or "shipped:"
    read = config.reads_weights or config.backbone.name == "auto"
    folder = getattr(config.task, "folder", None)
    return folder is not None or (read and not weights.startswith(("shipped:", "hub:")))


def cells_of(one: Sweep, folder: Path) -> list[Cell]:
    assert one.table is not None
    return list(grid(one, one.table, Ledger(folder / "results")).values())


def test_all_tables_have_their_files() -> None:
    for files in (PAPER, LAPTOP):
        tables = [table_of(file) for file in files if re.match(r"[tr]\d", file.name)]
        assert sorted(tables) == sorted(TABLES)
    assert len(PAPER) == 24  # and the attention maps
    assert len(LAPTOP) == 27  # and the English backbone, two fields tuned, and modalities
    assert len(FILES) == 52  # and the quickstart


def test_a_paper_file_and_its_laptop_file_have_one_name() -> None:
    own = {"english-backbone.yaml", "tuned-two-fields.yaml", "modalities.yaml"}
    laptop = {file.name for file in LAPTOP} - own

    assert {file.name for file in PAPER} == laptop


def test_sweeps_have_names_of_their_own() -> None:
    names = {file: load(file).name for file in FILES}

    assert len(set(names.values())) == len(FILES)
    for file in (*PAPER, *LAPTOP):
        assert names[file] in (f"{file.parent.name}-{file.stem}", file.stem)


def test_all_validate_in_one_command() -> None:
    result = CliRunner().invoke(app, ["validate", *map(str, FILES)])

    assert result.exit_code == 0, result.output
    assert result.stdout.count(".yaml: ") == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_plan_needs_no_data(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clone" / file.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    shutil.copy(file, copy)

    planned = sweep.plan(copy, tmp_path / "results")

    assert planned.packs
    assert not any(planned.counts()[state] for state in ("done", "diverged", "failed"))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_headers_name_their_trials_and_their_command(file: Path) -> None:
    one = load(file)
    trials = field(file, "trials")
    told = re.match(r"([\d,]+)", trials)
    pretraining = re.search(r"and (one|two) that pretrains? a backbone", trials)

    assert told is not None
    left_out = sum(some.trials for some in one.left_out)
    assert int(told[1].replace(",", "")) == len(one.points) + left_out
    # Where patterns overlap, what one leaves out is not counted again by the next.
    overlap = len({some.pattern.partition(" ")[0] for some in one.left_out}) > 1
    for some in one.left_out:
        path = some.why.removesuffix(" is not there").removeprefix("../../")
        module = path.removeprefix("package:").partition("/")[0].replace("_", "-")
        what = f"the package( {module})?" if path.startswith("package:") else path
        needed = re.search(rf"\b(\d+) (?:need )?{what}\b", trials)
        assert needed, some
        assert int(needed[1]) == some.trials or (overlap and int(needed[1]) > some.trials), some
    assert (NUMBER[pretraining[1]] if pretraining else 0) == len(one.pretrainings)
    tuned = re.search(r"after (\d+) that tune them(?: \((\d+) without those\))?", trials)
    # What is left out here is not tuned either.
    share = len(one.points) / (len(one.points) + left_out)
    assert int(tuned[1] if tuned else 0) * share == len(one.tunings)
    if tuned and tuned[2] and left_out:
        assert int(tuned[2]) == len(one.tunings)
    assert field(file, "run") == f"sweep run {file.relative_to(ROOT).as_posix()}"


@pytest.mark.parametrize("file", [*PAPER, *LAPTOP], ids=name)
def test_headers_tell_the_operations(file: Path) -> None:
    one = load(file)
    told = field(file, "flops")
    everything = re.match(r"([\d.]+e\d+) in matrix products \(fpt\.flops\)", told)
    without = re.search(r", ([\d.]+e\d+) without", told)

    assert everything is not None
    if not one.left_out:
        every = sum(training_flops(point.config) for point in one.all)
        assert float(everything[1]) == pytest.approx(every, rel=0.01)
    here = [point.config for point in one.all if not needs_something(point.config)]
    bare = without or everything
    assert float(bare[1]) == pytest.approx(sum(map(training_flops, here)), rel=0.01)


@pytest.mark.parametrize("file", [*PAPER, *LAPTOP], ids=name)
def test_laptop_files_have_a_time_and_paper_files_none(file: Path) -> None:
    text = file.read_text(encoding="utf-8")

    assert not re.search(r"^#   hours", text, re.MULTILINE)
    if file in PAPER:
        assert not re.search(r"^#   minutes", text, re.MULTILINE)
    elif file.stem != "english-backbone":
        assert 0 < minutes(file) <= 90


def minutes(file: Path) -> int:
    """What the header says that a file takes with everything it can have, alone."""
    return max(map(int, re.findall(r"\b\d+\b", field(file, "minutes").partition(" on ")[0])))


def test_all_laptop_files_together_take_less_than_six_hours() -> None:
    files = [file for file in LAPTOP if file.stem != "english-backbone"]
    trials = [(p.trial_id, training_flops(p.config)) for file in files for p in load(file).all]
    # A trial that files share is trained once.
    once = sum(dict(trials).values()) / sum(flops for _, flops in trials)

    assert sum(map(minutes, files)) * once <= 6 * 60


@pytest.mark.parametrize("file", PAPER, ids=name)
def test_every_published_cell_has_its_trials_and_the_other_way_round(
    file: Path, tmp_path: Path
) -> None:
    one = load(file)
    assert one.table is not None
    wanted = REPEATS.get(table_of(file), table_of(file))
    if wanted not in references():
        assert one.table.reference is None
        return
    assert one.table.reference == wanted
    figures = references()[wanted].figures
    cells = cells_of(one, tmp_path)

    assert {(c.figure.row, c.figure.column) for c in cells if c.figure} == set(figures)
    for cell in cells:
        assert cell.figure or cell.metric == "validation_accuracy", (cell.row, cell.column)
        assert cell.expected == 3


@pytest.mark.parametrize("file", PAPER, ids=name)
def test_paper_files_are_in_the_setting_of_the_published_figures(
    file: Path, tmp_path: Path
) -> None:
    apart = {
        (reason, cell.row)
        for cell in cells_of(load(file), tmp_path)
        if cell.figure and cell.figure.unit == ACCURACY
        for reason in cell.differs
    }

    # What the paper quotes from others cannot be run again here.
    assert {reason for reason, _ in apart} <= {"figure of another model and code"}
    assert {row for _, row in apart} <= {"full", "lstm", "vanilla-transformer", "linformer"}


def test_a_trial_that_two_tables_show_is_one_trial() -> None:
    # So that a table costs no more than what it alone has.
    sweeps = {table_of(file): load(file) for file in PAPER if re.match(r"[tr]\d", file.name)}
    ids = {table: {point.trial_id for point in one.points} for table, one in sweeps.items()}
    language = {
        point.trial_id for point in sweeps["T2"].points if point.labels["pretraining"] == "language"
    }

    assert ids["T6"] < ids["T2"]
    assert ids["T19"] == ids["T15"]
    assert ids["T14"] & ids["T13"]
    assert ids["T16"] & ids["T2"]
    for table in ("T6", "T9", "T13", "T15"):
        assert language <= ids[table], table
    # Full on Bit Memory is also what is trained before it is frozen.
    (pretraining,) = sweeps["T2"].pretrainings
    assert pretraining.trial_id in ids["T1"]


def test_with_the_data_at_hand_nothing_is_left_out(data: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "experiments/laptop", tmp_path / "experiments/laptop")
    (tmp_path / "data").symlink_to(data)

    for file in sorted((tmp_path / "experiments/laptop").glob("*.yaml")):
        one = load(file)
        left_out = [some for some in one.left_out if not re.search("package:|/weights/", some.why)]
        assert not left_out, file
        if not one.left_out:
            every = sum(training_flops(point.config) for point in one.all)
            told = re.match(r"[\d.]+e\d+", field(file, "flops"))
            assert told is not None
            assert float(told[0]) == pytest.approx(every, rel=0.01)


def test_the_quickstart_and_table_2_share_a_pretraining() -> None:
    quickstart = load(ROOT / "experiments/quickstart.yaml")
    table = load(ROOT / "experiments/laptop/t02-modality.yaml")

    assert {one.trial_id for one in quickstart.pretrainings} <= {
        one.trial_id for one in table.pretrainings
    }


@pytest.mark.parametrize("file", LAPTOP, ids=name)
def test_no_claim_of_a_laptop_file_hangs_on_an_untuned_rate_or_on_few_seeds(file: Path) -> None:
    one = load(file)
    if one.spec.claims and file.stem != "tuned-two-fields":  # that one shows tuning, not a finding
        assert one.studies
        assert {point.labels["seed"] for point in one.points} == set("01234")
