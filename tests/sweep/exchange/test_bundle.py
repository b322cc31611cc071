"""Bundles: one ledger, one sequence of bytes; read as ledgers; hostile ones do no harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sweep.analysis import tables
from sweep.analysis.tables import load_table
from sweep.exchange.bundle import MANIFEST, BundleError, export, opened, unpack
from sweep.exchange.merging import merge
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep
from tests.support import failure_row, trial_row

FILE = """\
sweep: bundled
description: Whether it survives a journey.
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
axes:
  pretraining: [random]
  task: [bit-xor, "journey:Parity"]
  learning_rate: [0.001, 0.01]
  seed: [0, 1]
table: {rows: learning_rate, columns: task}
claims: [{that: "0.01 > 0.001", axis: learning_rate, "on": test_accuracy, per: task}]
"""
MODULE = """\
import fpt
import numpy as np


class Parity(fpt.Task):
    bits: int = 8

    def shape(self, protocol):
        return fpt.Shape(tokens=self.bits, inputs=1, embedded=False, classes=2)
"""
TENSORS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("journey.py").write_text(MODULE)
    Path("bundled.yaml").write_text(FILE)
    Path("bundled.lock").write_text('{"datasets": {}, "format": 1, "models": {}}\n')
    return load("bundled.yaml")


@pytest.fixture
def ledger(sweep: Sweep) -> Ledger:
    """Seven of eight trials done, and what is none of theirs."""
    ledger = Ledger("results", write=True)
    for number, point in enumerate(sweep.points[:-1]):
        curve = [
            {"step": step, "split": split, "loss": 1 / step, "accuracy": 0.5}
            for step in (2, 4)
            for split in ("train", "validation")
        ]
        ledger.append_curve(point.trial_id, "a1", 0, curve)
        ledger.put_state(point.trial_id, TENSORS)
        ledger.commit(trial_row(point, test_accuracy=number / 8))
    ledger.fail(failure_row(sweep.points[-1]))
    ledger.commit(trial_row(sweep.points[0], trial_id="0" * 12))
    ledger.fail(failure_row(sweep.points[0], trial_id="0" * 12))
    return ledger


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without its drawings, which take a second a bundle."""
    monkeypatch.setattr("sweep.analysis.report.render", lambda sweep, ledger: f"<p>{sweep.name}")


def content(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.usefixtures("plain")
def test_a_bundle_has_the_sweep_and_its_part_of_the_ledger(sweep: Sweep, ledger: Ledger) -> None:
    bundle = export(sweep, ledger, Path("bundle.zip"))

    members = content(bundle.path)
    manifest = json.loads(members.pop(MANIFEST))
    assert (bundle.trials, bundle.expected, bundle.members) == (7, 8, len(members) + 1)
    assert bundle.sha256 == hashlib.sha256(bundle.path.read_bytes()).hexdigest()
    # By another hand: every file, and nothing else, with the digest that it has.
    assert manifest["members"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in members.items()
    }
    for name in ("bundled.yaml", "bundled.lock", "journey.py"):
        assert members[name] == Path(name).read_bytes()
    of = [Path(name).parts[1] for name in members if name.startswith("results/")]
    assert sorted(of) == ["curves", "failures", "notes", "trials"]
    with opened("bundle.zip") as inside:
        tables = (inside.trials(), inside.curves(), inside.failures())
        assert [table.num_rows for table in tables] == [7, 28, 1]
    assert not any("0" * 12 in name for name in members)
    assert {name for name in members if name.startswith("tables/")} == {
        f"tables/{name}"
        for name in ("table.md", "table.csv", "table.tex", "table.html", "claims.md", "claims.json")
    }
    assert b"0.01" in members["tables/claims.md"]
    assert members["report.html"] == b"<p>bundled"
    statuses = [one["status"] for one in json.loads(members["trials.json"])]
    assert statuses == ["done"] * 7 + ["failed"]
    readme = members["README.md"].decode()
    assert "8 trials: 7 done, 1 failed." in readme
    assert "sweep table bundled.yaml" in readme


@pytest.mark.usefixtures("plain")
def test_states_come_by_request(sweep: Sweep, ledger: Ledger) -> None:
    ledger.put_backbone(sweep.points[0].trial_id, TENSORS)
    export(sweep, ledger, Path("bundle.zip"), states=True)

    with opened("bundle.zip") as inside:
        assert len(inside.states()) == 7
        assert inside.backbones() == {sweep.points[0].trial_id}


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_ledger_gives_the_same_bytes(
    drawn: bool, sweep: Sweep, ledger: Ledger, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    if not drawn:
        request.getfixturevalue("plain")
    first = export(sweep, ledger, Path("bundle.zip"))

    # Elsewhere, later, from a copy with other times and another order of its files.
    shutil.copytree("results", tmp_path / "other/results", copy_function=shutil.copyfile)
    for name in ("bundled.yaml", "bundled.lock", "journey.py"):
        shutil.copy(name, tmp_path / "other")
    os.utime(tmp_path / "other/bundled.yaml", (0, 0))
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    again = export(load(tmp_path / "other/bundled.yaml"), Ledger("results"), Path("again.zip"))

    assert again.path.read_bytes() == (tmp_path / "work" / first.path).read_bytes()


@pytest.mark.usefixtures("plain")
def test_an_unpacked_bundle_gives_the_same_table(
    sweep: Sweep, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(sweep, ledger, Path("bundle.zip"))
    with zipfile.ZipFile("bundle.zip") as archive:
        archive.extractall(tmp_path / "unpacked")

    monkeypatch.chdir(tmp_path / "unpacked")
    table = load_table("bundled.yaml")

    assert table.to_markdown() == Path("tables/table.md").read_text()
    assert table.to_csv() == Path("tables/table.csv").read_text()
    assert "6.2" in table.to_markdown()  # the mean of 0 and 12.5


@pytest.mark.usefixtures("plain")
def test_an_export_of_nothing_and_of_no_table(sweep: Sweep) -> None:
    Path("none.yaml").write_text(FILE[: FILE.index("table:")])
    bundle = export(load("none.yaml"), Ledger("empty"), Path("bundle.zip"))
    assert bundle.trials == 0
    assert not Path("empty").exists()
    assert "sweep table" not in content(bundle.path)["README.md"].decode()


@pytest.mark.usefixtures("plain")
def test_a_bundle_says_one_thing_while_a_run_is_under_way(
    sweep: Sweep, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tables.build

    def meanwhile(sweep: Sweep, still: Ledger) -> tables.Table:
        ledger.commit(trial_row(sweep.points[-1], test_accuracy=1.0))
        ledger.append_curve(sweep.points[-1].trial_id, "a1", 0, [{"step": 2, "split": "train"}])
        ledger.compact()
        return build(sweep, still)

    monkeypatch.setattr(tables, "build", meanwhile)
    bundle = export(sweep, ledger, Path("bundle.zip"))

    statuses = [one["status"] for one in json.loads(content(bundle.path)["trials.json"])]
    assert statuses == ["done"] * 7 + ["failed"]
    assert bundle.trials == 7
    with opened("bundle.zip") as inside:
        assert len(inside.done()) == len(inside.trials()) == 7
        assert len(set(inside.curves().column("trial_id").to_pylist())) == 7


@pytest.mark.usefixtures("plain")
def test_how_rows_lie_makes_no_difference_to_a_bundle(sweep: Sweep, ledger: Ledger) -> None:
    first = export(sweep, ledger, Path("bundle.zip"))
    ledger.compact()
    again = export(sweep, Ledger("results"), Path("again.zip"))
    assert again.path.read_bytes() == first.path.read_bytes()


@pytest.mark.usefixtures("plain")
def test_a_bundle_that_cannot_be_written(sweep: Sweep, ledger: Ledger) -> None:
    with pytest.raises(BundleError, match=r"bundled\.yaml: .* ends in \.zip"):
        export(sweep, ledger, Path("bundled.yaml"))
    with pytest.raises(BundleError, match="cannot be written"):
        export(sweep, ledger, Path("nowhere/bundle.zip"))
    trial = Path("results/trials") / f"{sweep.points[0].trial_id}.parquet"
    trial.write_bytes(b"PAR1")
    with pytest.raises(LedgerError, match=trial.name):
        export(sweep, Ledger("results"), Path("bundle.zip"))
    assert [path.name for path in Path().iterdir() if "zip" in path.name] == []


@pytest.mark.usefixtures("plain")
def test_a_bundle_is_a_ledger_to_merge(sweep: Sweep, ledger: Ledger) -> None:
    export(sweep, ledger, Path("bundle.zip"))
    merged = merge(["bundle.zip"], "mine")
    assert (merged.trials, merged.failures) == (7, 1)
    table = load_table("bundled.yaml", "mine").to_markdown()
    assert table == load_table("bundled.yaml").to_markdown()


# --- bundles of somebody else's -------------------------------------------------------------------


def bundle(
    members: Mapping[str, bytes], *, lie: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """A bundle with these members, and a manifest that fits them but for a lie."""
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in members.items()
    }
    manifest: dict[str, Any] = {"format": 1, "members": listed}
    if lie is not None:
        lie(manifest)
    with zipfile.ZipFile("theirs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(MANIFEST, json.dumps(manifest))
    return Path("theirs.zip")


ROW = f"results/trials/{'1' * 12}.parquet"


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.parquet",
        "results/../../evil.parquet",
        "/tmp/evil.parquet",
        "results/trials/..\\..\\evil.parquet",
        "C:/evil.parquet",
        f"results/trials/../../{'1' * 12}.parquet",
    ],
)
def test_names_that_leave_the_folder_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = bundle({name: b"x"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match="would not stay in its folder"):
        merge([file], "mine")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"results/trials/evil.sh": b"x"}, "no object of a ledger"),
        ({f"results/cache/{'1' * 12}.parquet": b"x"}, "no object of a ledger"),
        ({"results/mlflow.db": b"x"}, "no object of a ledger"),
        ({ROW: b"PAR1 but not really PAR1"}, f"theirs.zip: {ROW}: cannot be read"),
    ],
)
def test_what_is_no_ledgers_is_refused(
    members: dict[str, bytes], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LedgerError, match=said):
        merge([bundle(members)], "mine")
    assert not Path("mine").exists()


def test_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("theirs.zip", "w") as archive:
        info = zipfile.ZipInfo(ROW)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BundleError, match="would not stay in its folder"):
        unpack(Path("theirs.zip"), tmp_path / "out")


def test_bombs_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweep.exchange.bundle.SLACK", 1 << 20)
    file = bundle({ROW: b"", "report.html": bytes(4 << 20)})
    assert file.stat().st_size < 10_000
    with pytest.raises(BundleError, match=r"unpacks to 0\.0 GB, .* times its size"):
        unpack(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_that_says_less_than_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = bundle({ROW: bytes(100_000)})
    # The size in the directory at the end is a lie: what is read stops there, and is found out.
    data = file.read_bytes()
    size = (100_000).to_bytes(4, "little")
    assert data.count(size) == 2
    file.write_bytes(data.replace(size, (5).to_bytes(4, "little")))
    with pytest.raises(BundleError):
        unpack(file, tmp_path)
    assert (tmp_path / ROW).stat().st_size <= 5


def no_member(manifest: dict[str, Any]) -> None:
    manifest["members"].popitem()


def another_digest(manifest: dict[str, Any]) -> None:
    manifest["members"][ROW]["sha256"] = "0" * 64


def one_more(manifest: dict[str, Any]) -> None:
    manifest["members"]["results/trials/222222222222.parquet"] = manifest["members"][ROW]


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (no_member, f"{ROW}: is not listed in manifest.json"),
        (another_digest, f"{ROW}: is not what manifest.json says"),
        (lambda manifest: manifest["members"][ROW].update(sha256=5), "is not what manifest.json"),
        (one_more, "222222222222.parquet: is missing, and is listed"),
        (lambda manifest: manifest.update(format=3), "a bundle of format 3"),
        (lambda manifest: manifest.update(members=[]), "manifest.json is damaged"),
        (lambda manifest: manifest.pop("members"), "manifest.json is damaged"),
        (lambda manifest: manifest["members"].update({ROW: 7}), "manifest.json is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit(
    lie: Callable[[dict[str, Any]], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=said):
        unpack(bundle({ROW: b"row"}, lie=lie), tmp_path)


def test_the_same_name_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = bundle({ROW: b"row"})
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(ROW, b"another")
    with pytest.raises(BundleError, match="is in it twice"):
        unpack(file, tmp_path)


def test_damage_that_zipfile_has_no_word_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("packed.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("manifest.json", json.dumps({"format": 1, "members": {}}))
    data = bytearray(Path("packed.zip").read_bytes())
    data[60:70] = bytes(10)
    Path("packed.zip").write_bytes(data)
    with pytest.raises(BundleError, match=r"packed\.zip: no bundle, or damaged"):
        unpack(Path("packed.zip"), tmp_path)


def test_what_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.zip").write_text("no zip")
    with pytest.raises(BundleError, match=r"text\.zip: no bundle, or damaged"):
        unpack(Path("text.zip"), tmp_path)
    with zipfile.ZipFile("plain.zip", "w") as archive:
        archive.writestr("a", b"b")
    with pytest.raises(BundleError, match="no bundle: `sweep export` writes one"):
        unpack(Path("plain.zip"), tmp_path)


@pytest.mark.usefixtures("plain")
def test_a_bundle_damaged_anywhere_is_never_taken_for_whole(
    sweep: Sweep, ledger: Ledger, tmp_path: Path
) -> None:
    file = export(sweep, ledger, Path("bundle.zip")).path
    data = file.read_bytes()
    with opened(file) as inside:
        whole = inside.trials()
    step = len(data) // 40
    for number, place in enumerate(range(step // 2, len(data), step)):
        damaged = io.BytesIO(data)
        damaged.seek(place)
        damaged.write(bytes([data[place] ^ 0xFF]))
        file.write_bytes(damaged.getvalue() if number % 4 else data[:place])
        try:
            with opened(file) as inside:
                read = inside.trials()
        except LedgerError:
            continue
        # What is changed is no object of the ledger, such as a page of the report.
        assert read.equals(whole)
