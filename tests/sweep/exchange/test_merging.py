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
from sweep.exchange import merging
from sweep.exchange.merging import ContradictionError, merge, upgrade
from sweep.ledger.ledger import TRIALS, Dataset, Ledger, LedgerError
from sweep.ledger.storage import Folder
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


def content(folder: str | Path) -> dict[str, Any]:
    """What a ledger says, however its rows lie; NaN by its name."""
    ledger = Ledger(folder)
    tables = (ledger.trials(), ledger.failures(), ledger.curves())
    rows = {str(n): [repr(row) for row in table.to_pylist()] for n, table in enumerate(tables)}
    others = ("states/", "backbones/", "notes/")
    return rows | {n: data for n, data in tree(folder).items() if n.startswith(others)}


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
                united.append(content(folder / f"united{number}"))

        everything = {trial for book in books for trial in book}
        for one in united:
            assert one == united[0]  # commutative
            assert len(one["0"]) == len(everything)
            assert len(one["1"]) == len(failed)
        if not sources:
            return
        again = merge([*sources, *sources], folder / "united0")
        assert content(folder / "united0") == united[0]  # idempotent
        assert (again.trials, again.begun, again.failures) == (0, 0, 0)
        # Associative: the first two before the third, the last two before the first.
        for number, (pair, other) in enumerate(
            [(sources[:2], sources[2:]), (sources[1:], sources[:1])]
        ):
            if pair and other:
                merge(pair, folder / f"pair{number}")
                merge([str(folder / f"pair{number}"), *other], folder / f"both{number}")
                assert content(folder / f"both{number}") == united[0]


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
    curves = {(one["trial_id"], one["attempt"]) for one in Ledger(mine.uri).curves().to_pylist()}
    assert curves == {(trial, f"attempt.{by}") for trial, by in hosts.items()}
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
    assert set(Ledger(mine.uri).curves().column("attempt").to_pylist()) == {"attempt.a"}


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


@pytest.mark.parametrize("compacted", [False, True])
def test_a_merge_that_was_killed_is_finished_by_the_same_call(
    compacted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = row(9, own_code='{"mine.py": "0"}')
    one = ledger_of(tmp_path / "one", [*(row(number) for number in range(4)), own])
    one.fail(note(2))
    one.save_state(name(7), TENSORS, step=9, attempt="a")
    one.append_curve(name(7), "a", 0, [point(1)])
    if compacted:
        one.compact()
    merge([tmp_path / "one"], tmp_path / "whole")
    assert content(tmp_path / "whole") == content(tmp_path / "one")
    monkeypatch.setattr(merging, "TOGETHER", 2)
    create = Folder.create
    for survives in itertools.count():
        calls, cut = itertools.count(), tmp_path / f"cut{survives}"

        def create_some(
            self: Folder, name: str, data: bytes, most: int = survives, calls: Any = calls
        ) -> bool:
            if next(calls) == most:
                raise KeyboardInterrupt
            return create(self, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "create", create_some)
            try:
                merge([tmp_path / "one"], cut)
                break
            except KeyboardInterrupt:
                pass
        # What is there as done is whole.
        assert Ledger(cut).done() <= set(Ledger(cut).curves().column("trial_id").to_pylist())
        merge([tmp_path / "one"], cut)
        assert content(cut) == content(tmp_path / "whole")
    assert survives > 6


def test_ledgers_that_were_compacted_unite_as_others_do(tmp_path: Path) -> None:
    for who, numbers in (("one", range(5)), ("other", range(3, 9))):
        ledger = ledger_of(tmp_path / who, [row(number, who[0]) for number in numbers])
        ledger.fail(note(3, who))
    merge([tmp_path / "one", tmp_path / "other"], tmp_path / "apart")
    Ledger(tmp_path / "one").compact()
    merge([tmp_path / "one", tmp_path / "other"], tmp_path / "mixed")
    Ledger(tmp_path / "other").compact()
    merged = merge([tmp_path / "other"], tmp_path / "one")

    assert (merged.trials, merged.present, merged.failures) == (4, 2, 1)
    assert content(tmp_path / "mixed") == content(tmp_path / "apart")
    assert len(Ledger(tmp_path / "one").trials()) == 9


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

    assert content(tmp_path / "back") == content(tmp_path / "direct")
    assert len(Ledger(bucket).done()) == 5
    assert merge([tmp_path / "one"], bucket).trials == 0


# --- upgrade ------------------------------------------------------------------------------------


def write(file: Path, dataset: Dataset, table: pa.Table, *, version: int) -> None:
    """A file of rows as fpt-sweep writes it, with some of the columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fields = [dataset.schema.field(name) for name in table.column_names]
    table = table.cast(pa.schema(fields))
    with pq.ParquetWriter(file, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"schema_version": str(version)})


@pytest.fixture
def old_ledger(tmp_path: Path) -> Path:
    """A ledger of rows that lack columns, with the published rows."""
    folder = tmp_path / "old"
    published = pq.read_table(PUBLISHED / "trials.parquet")
    known = [name for name in published.column_names if name in TRIALS.schema.names]
    published = published.select([name for name in known if name != "accumulation"])
    for number in range(published.num_rows):
        own = published.slice(number, 1)
        file = folder / f"trials/{own['trial_id'][0]}.parquet"
        write(file, TRIALS, own, version=1)
    trial = str(published["trial_id"][0])
    ledger = Ledger(folder)
    ledger.append_curve(trial, "a", 0, [point(2)])
    ledger.fail(note(0, "a", trial_id=trial, seconds=2.0))
    return folder


def test_an_older_ledger_in_the_layout_of_today(old_ledger: Path, tmp_path: Path) -> None:
    before = tree(old_ledger)
    new = tmp_path / "new"

    done = upgrade(old_ledger, new)

    assert (done.merged.trials, done.merged.failures, done.merged.present) == (49, 1, 0)
    assert done.stale == ()
    assert tree(old_ledger) == before
    old, newer = Ledger(old_ledger), Ledger(new)
    assert newer.trials().equals(old.trials())
    assert newer.failures().equals(old.failures())
    assert newer.curves().equals(old.curves())
    assert newer.trials()["accumulation"].null_count == 49
    table = api.load_table(QUICKSTART, new).to_markdown()
    assert table == (PUBLISHED / "table.md").read_text(encoding="utf-8")

    again = upgrade(old_ledger, new).merged
    assert (again.trials, again.failures, again.present) == (0, 0, 49)


def test_rows_that_stay_stale_are_told(
    old_ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TASKS["listops"], "version", 7)
    config = Ledger(old_ledger).trials()["config"][0].as_py()
    ledger_of(old_ledger, [row(1, identity_version=0, config=config)])

    done = upgrade(old_ledger, tmp_path / "new")

    mend = "stale, `sweep run FILE --stale` trains anew"
    assert done.stale == (
        f"1 trained under identity version 0, which is {IDENTITY_VERSION} now: {mend}",
        f"12 trained under version 1 of task listops, which is 7 now: {mend}",
    )
    assert plan(QUICKSTART, tmp_path / "new").counts()["stale"] == 12


def test_an_upgrade_is_never_in_place_and_never_over(old_ledger: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="is the old ledger itself"):
        upgrade(old_ledger, old_ledger)
    trial = Ledger(old_ledger).trials().slice(0, 1).to_pylist()[0]
    Ledger(tmp_path / "new").commit(trial | {"test_loss": 17.0})
    before = tree(tmp_path / "new")
    with pytest.raises(ContradictionError, match=r"and 17\.0|17\.0 and"):
        upgrade(old_ledger, tmp_path / "new")
    assert tree(tmp_path / "new") == before
