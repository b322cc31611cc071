"""Ledgers united: in any order the same, nothing lost or contradictory; older ones renewed."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sweep as api
from fpt.tasks import TASKS
from sweep.exchange.merging import ContradictionError, merge, upgrade
from sweep.ledger.ledger import CURVES, FAILURES, TRIALS, Dataset, Ledger, LedgerError
from sweep.planning.plan import plan
from sweep.sweepfile.identity import IDENTITY_VERSION
from tests.support import STARTED

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "experiments/quickstart.yaml"
PUBLISHED = ROOT / "results/published/quickstart"
TENSORS = b"\x02\0\0\0\0\0\0\0{}"
"""A safetensors file with nothing in it."""


def name(number: int) -> str:
    return f"{number:012x}"


def row(number: int, by: str = "a", **columns: Any) -> dict[str, Any]:
    """A row of a trial whose figures follow from its id, as somebody's machine finished it."""
    return {
        "trial_id": name(number),
        "cell_id": name(0),
        "task": "bit-xor",
        "task_version": TASKS["bit-xor"].version,
        "identity_version": IDENTITY_VERSION,
        "numerics": "fp32",
        "outcome": "done",
        "test_accuracy": number / 16,
        "test_loss": float("nan") if number % 2 else 0.5,
        "versions": json.dumps({"torch": "2.13.0", "python": by}),
        "device": "cpu",
        "device_name": "a processor",
        "host": by,
        "attempt": f"attempt.{by}",
        "finished_at": STARTED + dt.timedelta(seconds=ord(by)),
    } | columns


def note(number: int, by: str = "a", **columns: Any) -> dict[str, Any]:
    mine = {"trial_id": name(number), "attempt": by, "cause": "worker", "at": STARTED}
    return mine | columns


def point(step: int) -> dict[str, Any]:
    return {"step": step, "split": "train", "loss": 1.0, "accuracy": 0.5}


def ledger_of(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Ledger:
    """A ledger with these rows, a curve for each, and what was kept of some."""
    ledger = Ledger(folder, write=True)
    for one in rows:
        trial = one["trial_id"]
        ledger.append_curve(trial, one["attempt"], 0, [point(1), point(2)])
        if int(trial, 16) % 3 == 0:
            ledger.put_state(trial, TENSORS)
        ledger.commit(one)
    return ledger


def tree(folder: str | Path) -> dict[str, bytes]:
    """What a ledger holds, but for what is derived."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {n: p.read_bytes() for n, p in sorted(names.items()) if not n.startswith("cache/")}


# --- merge ----------------------------------------------------------------------------------------

# A ledger: who finished which trials. One that several finished has the same figures everywhere.
BOOKS = st.lists(
    st.dictionaries(st.integers(0, 6), st.sampled_from("abc"), max_size=4), min_size=3, max_size=3
)


@settings(max_examples=4, deadline=None)
@given(books=BOOKS, failed=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=4))
def test_the_order_of_ledgers_does_not_matter(
    books: list[dict[int, str]], failed: set[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = []
        for number, book in enumerate(books):
            own = ledger_of(folder / f"{number}", [row(trial, by) for trial, by in book.items()])
            for where, trial in failed:
                if where == number:
                    own.fail(note(trial, f"n{number}"))
            if book or any(where == number for where, _ in failed):
                sources.append(str(folder / f"{number}"))
        united = []
        for number, order in enumerate([sources, sources[::-1], [*sources[1:], *sources[:1]]]):
            if sources:
                merge(order, folder / f"united{number}")
                united.append(tree(folder / f"united{number}"))

        everything = {trial for book in books for trial in book}
        for one in united:
            assert one == united[0]  # commutative
            assert sum(n.startswith("trials/") for n in one) == len(everything)
            assert sum(n.startswith("failures/") for n in one) == len(failed)
        if not sources:
            return
        again = merge([*sources, *sources], folder / "united0")
        assert tree(folder / "united0") == united[0]  # idempotent
        assert (again.trials, again.begun, again.failures) == (0, 0, 0)
        # Associative: the first two before the third, the last two before the first.
        for number, (pair, other) in enumerate(
            [(sources[:2], sources[2:]), (sources[1:], sources[:1])]
        ):
            if pair and other:
                merge(pair, folder / f"pair{number}")
                merge([str(folder / f"pair{number}"), *other], folder / f"both{number}")
                assert tree(folder / f"both{number}") == united[0]


def test_counts_and_what_comes_from_where(tmp_path: Path) -> None:
    one = ledger_of(tmp_path / "one", [row(1, "b"), row(3, "b")])
    other = ledger_of(tmp_path / "other", [row(3, "a"), row(4, "a"), row(5, "a")])
    one.put_backbone(name(5), TENSORS)  # of no trial of its own: not taken
    other.put_backbone(name(4), TENSORS)
    mine = ledger_of(tmp_path / "mine", [row(1, "c")])
    before = tree(tmp_path / "mine")

    merged = merge([one.uri, other.uri], mine.uri)

    assert (merged.trials, merged.present, merged.doubled, merged.left_out) == (3, 1, 2, ())
    after = tree(tmp_path / "mine")
    assert {n: after[n] for n in before} == before  # nothing is written over
    hosts = {own["trial_id"]: own["host"] for own in Ledger(mine.uri).trials().to_pylist()}
    assert hosts == {name(1): "c", name(3): "a", name(4): "a", name(5): "a"}
    curves = sorted(n for n in after if n.startswith("curves/"))
    assert [n.split("/")[2] for n in curves] == [
        "attempt.c-000000.parquet", *["attempt.a-000000.parquet"] * 3
    ]  # fmt: skip
    assert Ledger(mine.uri).backbones() == {name(4)}


def test_other_figures_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    ledger_of(tmp_path / "one", [row(1), row(2), row(7)])
    ledger_of(tmp_path / "other", [row(1, "b", test_accuracy=0.1), row(2, "b", test_loss=0.25)])

    with pytest.raises(ContradictionError) as refused:
        merge([str(tmp_path / "one"), str(tmp_path / "other")], tmp_path / "mine")

    said = str(refused.value).splitlines()
    assert said[0] == "2 contradictions: one trial, other figures; nothing was written"
    where = f"{tmp_path / 'one'} and {tmp_path / 'other'}"
    assert said[1] == f"{where}: trial {name(1)}: test_accuracy 0.0625 and 0.1"
    assert said[2] == f"{where}: trial {name(2)}: test_loss 0.5 and 0.25"
    assert not (tmp_path / "mine").exists()
    with pytest.raises(ContradictionError):  # no preference makes a wrong figure right
        merge([tmp_path / "one", tmp_path / "other"], tmp_path / "mine", prefer_first=True)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"versions": json.dumps({"torch": "2.14.0"})}, "torch 2.13.0 and 2.14.0"),
        ({"device": "cuda", "device_name": "H"}, "device cpu and cuda"),
        ({"device_name": "B"}, "device name a processor and B"),
        ({"accumulation": 2}, "batches in 1 and in 2 parts"),
        ({"host": "other", "pack_size": 4, "git_commit": "1" * 40, "accumulation": 1}, ""),
    ],
)
def test_figures_that_may_differ_wait_for_a_word(
    columns: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    ledger_of(tmp_path / "one", [row(2, "b")])
    ledger_of(tmp_path / "other", [row(2, "a", test_loss=0.25, **columns), row(4)])
    sources = [tmp_path / "one", tmp_path / "other"]

    with pytest.raises(ContradictionError) as refused:
        merge(sources, tmp_path / "mine")

    # The one that was finished first is named first.
    turned = " and ".join(reversed(reason.removesuffix(" parts").split(" and ")))
    assert "test_loss 0.25 and 0.5" in str(refused.value)
    assert ("(" in str(refused.value).splitlines()[1]) == bool(reason)
    if not reason:
        return
    assert turned.split()[-1] in str(refused.value)
    merged = merge(sources, tmp_path / "mine", prefer_first=True)
    assert [one.excuse for one in merged.left_out] == [reason]
    assert merged.trials == 2
    kept = Ledger(tmp_path / "mine").trials([name(2)]).to_pylist()[0]
    assert (kept["test_loss"], kept["host"]) == (0.5, "b")


def test_bf16_has_its_reason_in_the_class(tmp_path: Path) -> None:
    ledger_of(tmp_path / "one", [row(2, numerics="bf16")])
    ledger_of(tmp_path / "other", [row(2, "b", numerics="bf16", test_loss=0.25)])
    merged = merge([tmp_path / "one", tmp_path / "other"], tmp_path / "m", prefer_first=True)
    assert [one.excuse for one in merged.left_out] == ["numerics bf16"]


@pytest.mark.parametrize("kind", ["trials", "curves", "failures", "backbones", "states"])
def test_damaged_files_are_named_and_refused(kind: str, tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "one", [row(1), row(3)])
    ledger.fail(note(1))
    ledger.put_backbone(name(1), TENSORS)
    damaged = next(path for path in sorted((tmp_path / "one" / kind).rglob("*.*")))
    damaged.write_bytes(damaged.read_bytes()[:-1])

    with pytest.raises(LedgerError, match=f"{damaged}: "):
        merge([tmp_path / "one"], tmp_path / "mine")

    assert not (tmp_path / "mine").exists()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "one", [row(1)])
    file = tmp_path / "one/trials" / f"{name(1)}.parquet"
    write(file, TRIALS, ledger.trials(), version=TRIALS.version + 1)
    with pytest.raises(LedgerError, match=r"is newer than .*upgrade fpt-sweep"):
        merge([tmp_path / "one"], tmp_path / "mine")


def test_what_never_ended_gives_way_to_what_did(tmp_path: Path) -> None:
    mine = Ledger(tmp_path / "mine", write=True)
    mine.save_state(name(1), TENSORS, step=9, attempt="mine")
    mine.append_curve(name(1), "zz", 0, [point(1)])
    ledger_of(tmp_path / "one", [row(1)])

    merge([tmp_path / "one"], mine.uri)

    assert not Ledger(mine.uri).states()
    assert [n for n in tree(mine.uri) if n.startswith("curves")] == [
        f"curves/{name(1)}/attempt.a-000000.parquet"
    ]


def test_begun_trials_go_on_from_the_furthest_state(tmp_path: Path) -> None:
    for who, step in (("one", 20), ("other", 100)):
        ledger = Ledger(tmp_path / who, write=True)
        ledger.save_state(name(1), TENSORS + b"", step=step, attempt=who)
        ledger.append_curve(name(1), who, 0, [point(step)])

    merged = merge([tmp_path / "one", tmp_path / "other"], tmp_path / "mine")

    assert (merged.trials, merged.begun) == (0, 1)
    assert [n for n in tree(tmp_path / "mine") if "/" in n] == [
        f"curves/{name(1)}/other-000000.parquet",
        f"states/{name(1)}/{100:012d}-other.safetensors",
    ]
    assert merge([tmp_path / "one"], tmp_path / "mine").begun == 0


def test_of_two_notes_of_an_attempt_the_later_one_counts(tmp_path: Path) -> None:
    Ledger(tmp_path / "one").fail(note(1, cause="worker", at=STARTED + dt.timedelta(hours=1)))
    Ledger(tmp_path / "other").fail(note(1, cause="interrupted"))
    merged = merge([tmp_path / "one", tmp_path / "other"], tmp_path / "mine")
    assert merged.failures == 1
    assert Ledger(tmp_path / "mine").failures().column("cause").to_pylist() == ["worker"]


def test_a_merge_that_was_killed_is_finished_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_of(tmp_path / "one", [row(number) for number in range(4)])
    merge([tmp_path / "one"], tmp_path / "whole")
    adopt = Ledger.adopt
    for survives in range(9):
        calls = itertools.count()

        def adopt_some(
            self: Ledger, name: str, data: bytes, most: int = survives, calls: Any = calls
        ) -> bool:
            if next(calls) == most:
                raise KeyboardInterrupt
            return adopt(self, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "adopt", adopt_some)
            with pytest.raises(KeyboardInterrupt):
                merge([tmp_path / "one"], tmp_path / f"cut{survives}")
        # What is there as done is whole.
        done = Ledger(tmp_path / f"cut{survives}").done()
        assert all((tmp_path / f"cut{survives}/curves/{trial}").is_dir() for trial in done)
        merge([tmp_path / "one"], tmp_path / f"cut{survives}")
        assert tree(tmp_path / f"cut{survives}") == tree(tmp_path / "whole")


def test_a_folder_without_a_ledger_is_told(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger: nothing was trained here"):
        merge([tmp_path / "nowhere"], tmp_path / "mine")
    ledger_of(tmp_path / "unpacked/results", [row(1)])
    with pytest.raises(LedgerError, match=r"did you mean .*unpacked/results"):
        merge([tmp_path / "unpacked"], tmp_path / "mine")


def test_from_a_bucket_and_into_one(bucket: str, tmp_path: Path) -> None:
    ledger_of(tmp_path / "one", [row(number, "a") for number in range(3)])
    ledger_of(tmp_path / "other", [row(number, "b") for number in range(2, 5)])

    merge([tmp_path / "one", tmp_path / "other"], bucket)
    merge([bucket], tmp_path / "back")
    merge([tmp_path / "one", tmp_path / "other"], tmp_path / "direct")

    assert tree(tmp_path / "back") == tree(tmp_path / "direct")
    assert len(Ledger(bucket).done()) == 5
    assert merge([tmp_path / "one"], bucket).trials == 0


# --- upgrade ------------------------------------------------------------------------------------


def write(file: Path, dataset: Dataset, table: pa.Table, *, version: int) -> None:
    """A file of rows as fpt-sweep wrote it under a schema version."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = table.select(dataset.at(version).names).cast(dataset.at(version))
    metadata = {"schema_version": str(version)}
    with pq.ParquetWriter(file, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)


@pytest.fixture
def first_release(tmp_path: Path) -> Path:
    """A ledger of schema version 1, with the rows of a run of it."""
    folder = tmp_path / "old"
    published = pq.read_table(PUBLISHED / "trials.parquet")
    for number in range(published.num_rows):
        own = published.slice(number, 1)
        file = folder / f"trials/{own['trial_id'][0]}.parquet"
        write(file, TRIALS, own.select(TRIALS.at(1).names), version=1)
    trial = str(published["trial_id"][0])
    point_ = point(2) | {"trial_id": trial, "attempt": "a", "segment": 0}
    curve = pa.Table.from_pylist([point_], schema=CURVES.schema)
    write(folder / f"curves/{trial}/a-000000.parquet", CURVES, curve, version=1)
    failed = pa.Table.from_pylist(
        [note(0, "a", trial_id=trial, seconds=2.0)], schema=FAILURES.schema
    )
    write(folder / f"failures/{trial}-a.parquet", FAILURES, failed, version=1)
    return folder


def versions(folder: Path, dataset: Dataset) -> set[int]:
    files = (folder / dataset.name).rglob("*.parquet")
    return {int(pq.read_metadata(file).metadata[b"schema_version"]) for file in files}


def test_an_older_ledger_in_the_schema_of_today(first_release: Path, tmp_path: Path) -> None:
    before = tree(first_release)
    new = tmp_path / "new"

    done = upgrade(first_release, new)

    # 49 rows, and the note of a failure; curves are as they were.
    assert (done.written, done.rewritten, done.present, done.stale) == (51, 50, 0, ())
    assert tree(first_release) == before
    assert versions(first_release, TRIALS) == {1}
    assert versions(new, TRIALS) == {TRIALS.version}
    assert versions(new, FAILURES) == {FAILURES.version}
    assert tree(new).keys() == before.keys()
    old, newer = Ledger(first_release), Ledger(new)
    assert newer.trials().equals(old.trials())
    assert newer.failures().equals(old.failures())
    assert newer.curves().equals(old.curves())
    assert newer.trials()["accumulation"].null_count == 49
    table = api.load_table(QUICKSTART, new).to_markdown()
    assert table == (PUBLISHED / "table.md").read_text(encoding="utf-8")

    again = upgrade(first_release, new)
    assert (again.written, again.present) == (0, 51)
    assert upgrade(new, tmp_path / "newest").rewritten == 0
    assert tree(tmp_path / "newest") == tree(new)


def test_rows_that_stay_stale_are_told(
    first_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TASKS["listops"], "version", 7)
    config = Ledger(first_release).trials()["config"][0].as_py()
    ledger_of(first_release, [row(1, identity_version=0, config=config)])

    done = upgrade(first_release, tmp_path / "new")

    mend = "stale, `sweep run FILE --stale` trains anew"
    assert done.stale == (
        f"1 trained under identity version 0, which is {IDENTITY_VERSION} now: {mend}",
        f"12 trained under version 1 of task listops, which is 7 now: {mend}",
    )
    assert plan(QUICKSTART, tmp_path / "new").counts()["stale"] == 12


def test_an_upgrade_is_never_in_place_and_never_over(first_release: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="is the old ledger itself"):
        upgrade(first_release, first_release)
    trial = Ledger(first_release).trials().slice(0, 1).to_pylist()[0]
    Ledger(tmp_path / "new").commit(trial | {"test_loss": 17.0})
    before = tree(tmp_path / "new")
    with pytest.raises(ContradictionError, match=r"and 17\.0|17\.0 and"):
        upgrade(first_release, tmp_path / "new")
    assert tree(tmp_path / "new") == before
