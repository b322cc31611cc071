"""The ledger: a row there is a trial done; nothing partial, nothing lost, nothing served stale."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.ledger.ledger import (
    CURVES,
    FAILURES,
    TRIALS,
    AlreadyOurs,
    Committed,
    Dataset,
    Ledger,
    LedgerError,
    TakenBy,
    new_attempt,
)
from sweep.ledger.storage import Entry

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def trial(number: int) -> str:
    """A trial id."""
    return f"{number:012x}"


def row(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A row of a trial, with a few columns."""
    ids = {"trial_id": trial(number), "cell_id": trial(number // 3)}
    return ids | {"task": "bit-xor", "outcome": "done", "seed": number, "test_loss": 0.5} | columns


def failure(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A row of a failed attempt."""
    return {"trial_id": trial(number), "attempt": "a1", "cause": "code", "at": NOW} | columns


def point(step: int, loss: float = 0.0, split: str = "train") -> dict[str, Any]:
    """A point of a curve."""
    return {"step": step, "split": split, "loss": loss, "accuracy": 0.5, "seconds": 1.0}


def fill(ledger: Ledger, numbers: Sequence[int]) -> None:
    for number in numbers:
        assert ledger.commit(row(number)) == Committed()


def ids(table: pa.Table) -> list[str]:
    return [str(one) for one in table.column("trial_id").to_pylist()]


# --- rows ---------------------------------------------------------------------------------------


def columns_of(dataset: Dataset, **fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Rows with any values that the schema allows, and any optional columns left out."""
    values: dict[pa.DataType, st.SearchStrategy[Any]] = {
        pa.string(): st.text(st.characters(exclude_categories=["Cs"])),
        pa.int32(): st.integers(-(2**31), 2**31 - 1),
        pa.int64(): st.integers(-(2**63), 2**63 - 1),
        pa.float64(): st.floats(),
        pa.bool_(): st.booleans(),
        pa.timestamp("us", "UTC"): st.datetimes(
            min_value=datetime(1970, 1, 1),  # noqa: DTZ001 (hypothesis adds the zone)
            timezones=st.sampled_from([UTC, timezone(timedelta(hours=-7))]),
        ),
    }
    known = {
        "outcome": st.sampled_from(["done", "diverged"]),
        "stopped": st.sampled_from(["steps", "plateau", "diverged"]),
        "attempt": st.from_regex(r"[A-Za-z0-9_.]+", fullmatch=True),
        **{name: st.just(value) for name, value in fixed.items()},
    }
    columns = {field.name: known.get(field.name, values[field.type]) for field in dataset.schema}
    needed = {name: columns.pop(name) for name in fixed}
    return st.fixed_dictionaries(
        needed, optional={name: st.none() | values for name, values in columns.items()}
    )


def same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)  # NaN


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(columns_of(TRIALS, trial_id="", cell_id=trial(7)), min_size=1, max_size=3),
)
def test_rows_come_back_as_they_were_committed(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = [one | {"trial_id": trial(number)} for number, one in enumerate(rows)]
        for one in written:
            assert Ledger(folder).commit(one) == Committed()

        for table in (Ledger(folder).trials(), Ledger(folder).trials()):  # from files, from cache
            read = table.to_pylist()

            assert len(read) == len(written)
            for was, one in zip(read, written, strict=True):
                assert list(was) == TRIALS.schema.names
                assert all(same(was[name], one.get(name)) for name in was)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"test_acuracy": 0.5}, "no such column: test_acuracy"),
        ({"trial_id": "../../etc"}, "trial_id"),
        ({"trial_id": None}, "trial_id is missing"),
        ({"cell_id": None}, "cell_id is missing"),
        ({"outcome": "failed"}, "outcome is 'failed'"),
        ({"attempt": "a-1"}, "attempt is 'a-1'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"layers": 2**31}, "too large"),
        ({"test_loss": True}, "test_loss is True"),
        ({"test_loss": "0.5"}, "test_loss is '0.5'"),
        ({"git_dirty": 1}, "git_dirty is 1"),
        ({"config": {"a": 1}}, "config is"),
        ({"finished_at": NOW.replace(tzinfo=None)}, "finished_at"),
    ],
)
def test_a_row_that_does_not_fit_is_a_fault_of_the_caller(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    ledger = Ledger(tmp_path / "results")

    with pytest.raises(ValueError, match=said):
        ledger.commit(row(**columns))

    assert not (tmp_path / "results").exists()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit(row(seed=np.int64(3), test_loss=np.float32(0.25), learning_rate=1))

    read = ledger.trials().to_pylist()[0]

    assert (read["seed"], read["test_loss"], read["learning_rate"]) == (3, 0.25, 1.0)


def test_the_first_commit_wins_and_its_file_is_never_touched(place: str) -> None:
    ledger = Ledger(place, write=True)

    assert ledger.done() == set()
    assert ledger.committed_by(trial(1)) is None
    assert ledger.commit(row(1, attempt="a1")) == Committed()
    before = ledger.storage.list("trials")
    assert ledger.commit(row(1, attempt="a2")) == TakenBy("a1")
    assert ledger.commit(row(1, attempt="a1", attempts=2)) == AlreadyOurs()
    assert ledger.commit(row(2)) == Committed()
    assert ledger.committed_by(trial(1)) == "a1"

    assert ledger.done() == {trial(1), trial(2)}
    assert before.items() <= ledger.storage.list("trials").items()
    assert ledger.trials([trial(1)]).column("attempt").to_pylist() == ["a1"]


def _commit(place: str, racer: int) -> list[bool]:
    ledger = Ledger(place)
    rows = (row(number, attempt=f"racer_{racer}") for number in range(20))
    return [ledger.commit(one) == Committed() for one in rows]


def test_of_processes_that_commit_one_trial_one_is_first(tmp_path: Path) -> None:
    place = str(tmp_path)
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        won = list(pool.map(_commit, [place] * 3, range(3)))

    assert [sum(trials) for trials in zip(*won, strict=True)] == [1] * 20
    for number, attempt in enumerate(Ledger(place).trials().column("attempt").to_pylist()):
        assert won[int(attempt.removeprefix("racer_"))][number]


WRITE = """
import sys
from tests.sweep.ledger.test_ledger import fill
from sweep.ledger.ledger import Ledger
fill(Ledger(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[2]) + 50))
"""


def test_readers_beside_writers_see_whole_rows_and_ever_more_of_them(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(tmp_path), str(start)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        )
        for start in (0, 50)
    ]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        for reader in (Ledger(tmp_path), Ledger(tmp_path)):
            table = reader.trials()
            assert seen <= table.num_rows <= 100
            assert set(table.column("outcome").to_pylist()) <= {"done"}
            seen = table.num_rows
        if seen:
            assert len(pandas.read_parquet(tmp_path / "trials")) >= seen

    assert [writer.returncode for writer in writers] == [0, 0]
    assert ids(Ledger(tmp_path).trials()) == [trial(number) for number in range(100)]


def test_pandas_reads_the_folder_of_trials(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    ledger = Ledger(tmp_path)
    fill(ledger, range(5))
    ledger.commit(row(9, best_step=3, finished_at=NOW, task=None, test_loss=None))
    ledger.trials()  # writes the cache

    frame = pandas.read_parquet(tmp_path / "trials")

    assert list(frame.columns) == TRIALS.schema.names
    assert sorted(frame.trial_id) == ids(ledger.trials())
    assert frame.test_loss.dtype == float
    assert frame.finished_at.dt.tz is not None
    assert frame.set_index("trial_id").loc[trial(9), "finished_at"] == NOW
    assert sorted(path.suffix for path in (tmp_path / "trials").iterdir()) == [".parquet"] * 6


def test_reading_makes_no_folder(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results", write=True)

    assert ledger.trials().num_rows == ledger.failures().num_rows == ledger.curves().num_rows == 0
    assert ledger.trials().schema == TRIALS.schema
    assert ledger.done() == ledger.states() == ledger.backbones() == set()
    assert ledger.holder("driver") is None
    assert not (tmp_path / "results").exists()


def test_a_full_disk_while_committing_loses_nothing_that_is_finished(
    small_disk: Callable[[str], Path],
) -> None:
    ledger = Ledger(small_disk("size=64k"), write=True)

    with pytest.raises(LedgerError, match=r"\.parquet: cannot be written: No space left on device"):
        fill(ledger, range(1000))

    done = ledger.done()
    assert done
    assert set(ids(Ledger(ledger.uri).trials())) == done
    assert all(entry.size for entry in ledger.storage.list("trials").values())


def test_a_ledger_without_write_permission_is_read(small_disk: Callable[[str], Path]) -> None:
    ledger = Ledger(small_disk("size=1m"))
    fill(ledger, range(3))
    small_disk("remount,ro,size=1m")

    for _ in range(2):
        assert Ledger(ledger.uri).trials().num_rows == 3
    assert ledger.usage()["cache"] == (0, 0)
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger(ledger.uri, write=True)


# --- other versions -----------------------------------------------------------------------------


def older(number: int, *lacking: str) -> bytes:
    """A row as a release wrote it that did not have some columns."""
    names = [name for name in TRIALS.schema.names if name not in lacking]
    schema = pa.schema([TRIALS.schema.field(name) for name in names])
    sink = pa.BufferOutputStream()
    meta = {"schema_version": "1"}
    pq.write_table(pa.Table.from_pylist([row(number)], schema.with_metadata(meta)), sink)
    return bytes(sink.getvalue())


def test_a_row_without_columns_that_came_later_has_nothing_there(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), [0, 2])
    data = older(1, "training_set_accuracy", "own_code")
    (tmp_path / f"trials/{trial(1)}.parquet").write_bytes(data)

    for ledger in (Ledger(tmp_path), Ledger(tmp_path)):  # from files, from the cache
        for wanted in (None, [trial(0), trial(1), trial(2)]):
            table = ledger.trials(wanted)
            assert table.schema == TRIALS.schema
            assert table.column("seed").to_pylist() == [0, 1, 2]
            assert table.column("training_set_accuracy").to_pylist() == [None] * 3
    assert (tmp_path / f"trials/{trial(1)}.parquet").read_bytes() == data  # as it was


def test_a_row_without_what_every_row_has_is_damaged(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), [0])
    (tmp_path / f"trials/{trial(1)}.parquet").write_bytes(older(1, "cell_id"))

    with pytest.raises(LedgerError, match="its columns are not those of trials: cell_id"):
        Ledger(tmp_path).trials()


# --- damage -------------------------------------------------------------------------------------


def parquet(dataset: Dataset, rows: Sequence[Mapping[str, Any]], version: object) -> bytes:
    """A file of rows as another version of us may have written it."""
    sink = pa.BufferOutputStream()
    meta = {} if version is None else {"schema_version": str(version)}
    pq.write_table(pa.Table.from_pylist(rows, dataset.schema.with_metadata(meta)), sink)
    return bytes(sink.getvalue())


def good(number: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Ledger(folder).commit(row(number, config="x" * 2000))
        return (Path(folder) / f"trials/{trial(number)}.parquet").read_bytes()


def flipped(data: bytes) -> bytes:
    """With one bit of the config's text changed, where nothing but a checksum tells."""
    place = data.index(b"bit-xor") + 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cannot be read .*delete the file and run the sweep again"),
    "start": (lambda: good(1)[:4], "cannot be read"),
    "half": (lambda: good(1)[: len(good(1)) // 2], "cannot be read"),
    "without its last byte": (lambda: good(1)[:-1], "cannot be read"),
    "a flipped bit": (lambda: flipped(good(1)), "cannot be read"),
    "no parquet": (lambda: b"PAR1 is not enough", "cannot be read"),
    "of another trial": (lambda: good(2), "its content belongs in trials/000000000002.parquet"),
    "two rows": (lambda: parquet(TRIALS, [row(1), row(1)], TRIALS.version), "it holds 2 rows"),
    "no row": (lambda: parquet(TRIALS, [], TRIALS.version), "it holds 0 rows"),
    "no version": (lambda: parquet(TRIALS, [row(1)], None), "no schema version"),
    "foreign version": (lambda: parquet(TRIALS, [row(1)], "x"), "cannot be read"),
    "other columns": (lambda: parquet(FAILURES, [failure(1)], 1), "its columns are not those"),
    "newer": (
        lambda: parquet(TRIALS, [row(1)], 99),
        (
            f"its schema version 99 is newer than {TRIALS.version}, the newest that this fpt-sweep "
            "reads; upgrade"
        ),
    ),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_named_and_the_others_are_kept(
    tmp_path: Path, damage: str, cached: bool
) -> None:
    data, said = DAMAGE[damage]
    fill(Ledger(tmp_path), range(3))
    if cached:
        Ledger(tmp_path).trials()
    path = tmp_path / f"trials/{trial(1)}.parquet"
    path.write_bytes(data())

    for ledger in (Ledger(tmp_path), Ledger(tmp_path)):
        for wanted in (None, [trial(1)]):
            with pytest.raises(LedgerError, match=rf"^{path}: .*{said}"):
                ledger.trials(wanted)
        assert ids(ledger.trials([trial(0), trial(2)])) == [trial(0), trial(2)]
        assert ids(ledger.trials(strict=False)) == [trial(0), trial(2)]
        assert len(ledger.damaged()) == 1
        assert trial(1) in ledger.done()
        assert "\n" not in ledger.damaged()[0]
    path.unlink()
    assert ids(Ledger(tmp_path).trials()) == [trial(0), trial(2)]
    assert Ledger(tmp_path).damaged() == ()


def test_many_damaged_rows_make_a_message_that_can_be_read(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(30))
    for path in (tmp_path / "trials").iterdir():
        path.write_bytes(b"")

    with pytest.raises(LedgerError) as caught:
        Ledger(tmp_path).trials()

    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 10 more"
    assert len(Ledger(tmp_path).damaged()) == 30


def test_damage_beside_the_trials_costs_no_trial(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, [1])
    ledger.fail(failure(1))
    ledger.append_curve(trial(1), "a1", 0, [point(0)])
    for path in [*tmp_path.rglob("failures/*"), *tmp_path.rglob("curves/*/*")]:
        path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(LedgerError, match="only this note of a failed attempt is lost"):
        ledger.failures()
    with pytest.raises(LedgerError, match="only this piece of a curve is lost"):
        ledger.curves()
    assert ledger.failures(strict=False).num_rows == 0
    assert ledger.curves(strict=False).num_rows == 0
    assert len(ledger.damaged("failures")) == len(ledger.damaged("curves")) == 1
    assert ledger.trials().num_rows == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_file_whatever_is_in_it_is_more_than_damaged(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Ledger(folder), [0, 1])
        before = Ledger(folder).trials([trial(0), trial(1)])
        path = Path(folder) / f"trials/{trial(1)}.parquet"
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)

        found = Ledger(folder).trials(strict=False)

        assert found in (before, before.slice(0, 1))


def test_files_of_others_among_ours_are_left_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, [1])
    (tmp_path / "trials" / f"{trial(1)} (copy).parquet").write_bytes(b"")
    (tmp_path / "trials" / ".DS_Store").touch()
    (tmp_path / "notes.txt").touch()

    assert ledger.done() == {trial(1)}
    assert ledger.trials().num_rows == 1


# --- cache --------------------------------------------------------------------------------------


class Counting(Ledger):
    """A ledger that notes which files of rows it reads."""

    def __init__(self, results: str | Path) -> None:
        super().__init__(results)
        self.read: list[str] = []
        get = self.storage.get

        def noted(name: str) -> bytes | None:
            if not name.startswith("cache/"):
                self.read.append(name)
            return get(name)

        self.storage.get = noted  # type: ignore[method-assign]


def test_a_row_is_read_once(place: str) -> None:
    fill(Ledger(place), range(40))
    first, second = Counting(place), Counting(place)

    assert first.trials().num_rows == second.trials().num_rows == 40
    assert len(first.read) == 40
    assert second.read == []
    fill(first, range(40, 43))
    assert first.trials().num_rows == second.trials().num_rows == 43
    assert first.read[40:] == [f"trials/{trial(number)}.parquet" for number in range(40, 43)]
    assert len(second.read) <= 3


def test_the_cache_is_not_rewritten_for_each_of_many_rows(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(250))
    Ledger(tmp_path).trials()
    cache = tmp_path / "cache/trials.parquet"
    before = cache.stat().st_mtime_ns

    fill(ledger := Ledger(tmp_path), [251])
    assert ledger.trials().num_rows == Ledger(tmp_path).trials().num_rows == 251
    assert cache.stat().st_mtime_ns == before
    fill(ledger, [252, 253, 254])
    assert ledger.trials().num_rows == 254
    assert cache.stat().st_mtime_ns != before
    reader = Counting(tmp_path)
    assert reader.trials().num_rows == 254
    assert reader.read == []


def test_a_row_that_changed_or_went_is_never_served_from_the_cache(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(4))
    long_lived = Ledger(tmp_path)
    long_lived.trials()

    (tmp_path / f"trials/{trial(0)}.parquet").unlink()
    changed = tmp_path / f"trials/{trial(2)}.parquet"
    size = changed.stat().st_size
    changed.unlink()
    Ledger(tmp_path).commit(row(2, test_loss=0.75))
    assert changed.stat().st_size == size

    for ledger in (long_lived, Ledger(tmp_path), Ledger(tmp_path)):
        table = ledger.trials()
        assert ids(table) == [trial(1), trial(2), trial(3)]
        assert table.column("test_loss").to_pylist() == [0.5, 0.75, 0.5]


@pytest.mark.parametrize("content", ["nothing", "empty", "garbage", "half", "a row", "older"])
def test_a_cache_may_be_lost_or_broken_at_any_time(tmp_path: Path, content: str) -> None:
    fill(Ledger(tmp_path), range(5))
    expected = Ledger(tmp_path).trials()
    cache = tmp_path / "cache/trials.parquet"
    whole = cache.read_bytes()
    if content == "nothing":
        shutil.rmtree(cache.parent)
    else:
        cache.write_bytes(
            {
                "empty": b"",
                "garbage": b"PAR1garbage",
                "half": whole[: len(whole) // 2],
                "a row": (tmp_path / f"trials/{trial(1)}.parquet").read_bytes(),
                "older": whole.replace(
                    b"schema_version\x18\x01%d" % TRIALS.version, b"schema_version\x18\x011"
                ),
            }[content]
        )
        assert cache.read_bytes() != whole

    reader = Counting(tmp_path)

    assert reader.trials() == expected
    assert len(reader.read) == 5
    assert Ledger(tmp_path).trials() == expected


def test_rows_are_sorted_whatever_was_cached_when(tmp_path: Path) -> None:
    for numbers in ([5, 9], [1, 7], [3]):
        fill(Ledger(tmp_path), numbers)
        Ledger(tmp_path).trials()

    assert ids(Ledger(tmp_path).trials()) == [trial(number) for number in (1, 3, 5, 7, 9)]
    assert ids(Ledger(tmp_path).trials([trial(7), trial(3), trial(8)])) == [trial(3), trial(7)]


def test_many_wanted_trials_are_chosen_from_the_cache(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(100))
    Ledger(tmp_path).trials()
    wanted = [trial(number) for number in range(0, 200, 2)]
    reader = Counting(tmp_path)

    assert ids(reader.trials(wanted)) == wanted[:50]
    assert reader.read == []


def test_some_columns_are_read_as_all_of_them_are(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(40))
    names = ["test_loss", "trial_id"]
    whole = Ledger(tmp_path).trials()
    fill(reader := Ledger(tmp_path), [40])  # beside those of the cache
    for ledger in (Ledger(tmp_path), reader, reader):
        assert ledger.trials(columns=names).slice(0, 40) == whole.select(names)
        assert ledger.trials([trial(3)], columns=names).to_pylist()[0]["trial_id"] == trial(3)
        assert ledger.trials(columns=["seed"]).num_rows == 41
        assert ledger.trials().select(names) == ledger.trials(columns=names)


def test_a_scan_has_the_rows_of_today(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.scan("trials").num_rows == 0
    fill(ledger, range(250))
    assert Ledger(tmp_path).scan("trials") == tmp_path / "cache" / "trials.parquet"
    fill(ledger, [251])  # too few to write the cache anew
    for one in (ledger, Ledger(tmp_path)):
        found = one.scan("trials")
        table = found if isinstance(found, pa.Table) else pq.ParquetFile(found).read()
        assert table == Ledger(tmp_path).trials()
        assert table.num_rows == 251
    (tmp_path / f"trials/{trial(251)}.parquet").write_bytes(b"")
    with pytest.raises(LedgerError, match=trial(251)):
        Ledger(tmp_path).scan("trials")


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("name", ["trials", "curves"])
def test_a_page_of_the_cache_that_is_damaged_costs_time_alone(
    tmp_path: Path, name: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Ledger(tmp_path), range(40))
    for number in range(40):
        point = {"step": number, "split": "train", "loss": 0.5}
        Ledger(tmp_path).append_curve(trial(number), "a1", 0, [point])
    read = getattr(Ledger(tmp_path), name)
    expected = read()
    cache = tmp_path / f"cache/{name}.parquet"
    data = bytearray(cache.read_bytes())
    data[len(data) // 8 : len(data) // 8 + 64] = bytes(64)
    cache.write_bytes(bytes(data))
    if stays:

        def refused(*_: object) -> None:
            raise LedgerError("read-only")

        monkeypatch.setattr("sweep.ledger.storage.Folder.put", refused)
        monkeypatch.setattr("sweep.ledger.storage.Folder.delete", refused)

    assert getattr(Ledger(tmp_path), name)() == expected
    assert getattr(Ledger(tmp_path), name)() == expected


def test_a_cache_that_goes_while_it_is_open_costs_time_alone(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(40))
    cache = tmp_path / "cache/trials.parquet"
    expected = Ledger(tmp_path).trials()
    reader = Ledger(tmp_path)
    assert reader.trials(columns=["seed"]).num_rows == 40

    # Of a mapped file, a page that is gone ends the process: on NFS once another has replaced it.
    assert str(cache) not in Path("/proc/self/maps").read_text()
    os.truncate(cache, 100)

    assert reader.trials() == expected


def test_a_snapshot_stays_as_it_was(place: str) -> None:
    ledger = Ledger(place)
    fill(ledger, range(3))
    ledger.append_curve(trial(0), "a1", 0, [{"step": 0, "split": "train"}])
    still = ledger.snapshot()
    assert len(still.done()) == still.curves().num_rows + 2 == 3
    fill(ledger, [3])
    ledger.append_curve(trial(3), "a1", 0, [{"step": 0, "split": "train"}])

    assert len(still.done()) == 3
    assert (still.trials().num_rows, still.curves().num_rows) == (3, 1)
    assert (ledger.trials().num_rows, ledger.curves().num_rows) == (4, 2)
    assert ledger.snapshot().trials().num_rows == 4


def test_a_curve_that_grows_within_a_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for segment in range(20):
        ledger.append_curve(trial(0), "a1", segment, [{"step": segment, "split": "train"}])
        assert Ledger(tmp_path).curves().num_rows == ledger.curves().num_rows == segment + 1


def test_curves_of_long_ago_are_not_read_again(tmp_path: Path) -> None:
    for number in range(40):
        Ledger(tmp_path).append_curve(trial(number), "a1", 0, [{"step": 0, "split": "train"}])
        os.utime(tmp_path / f"curves/{trial(number)}", (0, 0))
    first = Ledger(tmp_path).curves()
    reader = Counting(tmp_path)

    assert reader.curves() == first
    assert reader.read == []
    Ledger(tmp_path).append_curve(trial(7), "a1", 1, [{"step": 1, "split": "train"}])
    assert reader.curves().num_rows == 41
    assert {name.split("/")[1] for name in reader.read} == {trial(7)}


# --- curves -------------------------------------------------------------------------------------

SEGMENTS = st.dictionaries(
    keys=st.tuples(st.integers(0, 2), st.sampled_from(["a", "a1", "a10", "b"]), st.integers(0, 11)),
    values=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["train", "validation", "test"])), max_size=4
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(segments=SEGMENTS)
def test_the_last_value_of_a_step_counts(
    segments: dict[tuple[int, str, int], list[tuple[int, str]]],
) -> None:
    expected: dict[tuple[str, str, int], float] = {}
    number = 0.0
    for key in sorted(segments):
        for step, split in segments[key]:
            expected[trial(key[0]), split, step] = number
            number += 1
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        number = 0.0
        for owner, attempt, segment in sorted(segments):
            points = segments[owner, attempt, segment]
            rows = [point(s, number + i, split) for i, (s, split) in enumerate(points)]
            number += len(points)
            ledger.append_curve(trial(owner), attempt, segment, rows)

        every = [trial(owner) for owner in range(3)]
        tables = [ledger.curves(), Ledger(folder).curves(), ledger.curves(every)]

        for table in tables:
            keys = list(zip(*(table.column(c).to_pylist() for c in KEY), strict=True))
            assert keys == sorted(expected)
            assert table.column("loss").to_pylist() == [expected[key] for key in keys]


KEY = ("trial_id", "split", "step")


def test_a_piece_of_a_curve_without_points_is_no_piece(tmp_path: Path) -> None:
    Ledger(tmp_path / "results").append_curve(trial(0), "a1", 0, [])

    assert not (tmp_path / "results").exists()


def test_curves_of_some_trials(place: str) -> None:
    ledger = Ledger(place)
    for number in range(40):
        ledger.append_curve(trial(number), "a1", 0, [point(0, float(number))])

    few, many = [trial(3), trial(77)], [trial(number) for number in range(3, 80)]

    assert ledger.curves(few).column("loss").to_pylist() == [3.0]
    assert ledger.curves(many).column("loss").to_pylist() == [float(n) for n in range(3, 40)]
    assert ledger.curves().schema == CURVES.schema


def test_a_segment_that_is_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append_curve(trial(0), "a1", 0, [point(0, 1.0)])
    ledger.curves()
    ledger.append_curve(trial(0), "a1", 0, [point(0, 2.0)])

    assert ledger.curves().column("loss").to_pylist() == [2.0]


@pytest.mark.parametrize(
    ("segment", "rows"),
    [(-1, [point(0)]), (10**6, [point(0)]), (0, [point(0, split="dev")]), (0, [{"loss": 1.0}])],
)
def test_points_that_do_not_fit(tmp_path: Path, segment: int, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"curves: (segment|split|step)"):
        Ledger(tmp_path).append_curve(trial(0), "a1", segment, rows)


# --- failures, states, backbones, room ----------------------------------------------------------


def test_failures_are_kept_by_attempt_and_forgiven_by_a_mark(place: str) -> None:
    ledger = Ledger(place)
    ledger.fail(failure(1, attempt="a1", cause="memory"))
    ledger.fail(failure(1, attempt="a2", message="first"))
    ledger.fail(failure(1, attempt="a2", message="second"))
    ledger.fail(failure(2, attempt="a1", cause="data"))
    ledger.reset_failures([trial(1)])

    rows = ledger.failures().to_pylist()

    told = [(one["trial_id"], one["cause"], one["message"]) for one in rows]
    assert sorted(told[:3]) == sorted(
        [(trial(1), "memory", None), (trial(1), "code", "second"), (trial(1), "retried", None)]
    )
    assert told[3:] == [(trial(2), "data", None)]
    assert max(rows, key=lambda one: one["at"])["cause"] == "retried"
    assert ids(ledger.failures([trial(2)])) == [trial(2)]
    assert ledger.done() == set()


def test_failures_of_a_clock_that_is_ahead_are_forgiven(place: str) -> None:
    ledger = Ledger(place)
    ahead = datetime.now(UTC) + timedelta(minutes=10)
    ledger.fail(failure(1, attempt="a1", at=ahead))
    ledger.fail(failure(1, attempt="a2", at=ahead - timedelta(minutes=5)))
    ledger.fail(failure(2))

    before = datetime.now(UTC)
    ledger.reset_failures([trial(number) for number in range(4)])

    assert ledger.last_failures([trial(number) for number in range(4)]) == {}
    marks = [one for one in ledger.failures().to_pylist() if one["cause"] == "retried"]
    assert [one["trial_id"] for one in marks] == [trial(number) for number in range(4)]
    assert marks[1]["at"] == ahead + timedelta(microseconds=1)
    for one in (marks[0], *marks[2:]):
        assert before <= one["at"] <= datetime.now(UTC)
    ledger.fail(failure(1, attempt="a3", cause="data", at=ahead + timedelta(minutes=1)))
    assert ledger.last_failures([trial(1)])[trial(1)]["cause"] == "data"


def test_a_mark_of_work_done_twice_is_no_last_failure(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number, causes in enumerate(
        [("code", "doubled"), ("code", "worker", "doubled"), ("code", "retried", "doubled")]
    ):
        for minute, cause in enumerate(causes):
            at = NOW + timedelta(minutes=minute)
            ledger.fail(failure(number, attempt=f"a{minute}", cause=cause, at=at))

    last = ledger.last_failures([trial(number) for number in range(4)])

    assert {name: one["cause"] for name, one in last.items()} == {
        trial(0): "code",
        trial(1): "worker",
    }


def test_a_failure_says_its_cause(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cause is 'bad luck'"):
        Ledger(tmp_path).fail(failure(cause="bad luck"))


def test_attempts_are_unique_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = [new_attempt() for _ in range(1000)]

    assert len(set(attempts)) == 1000
    times = [attempt.rpartition(".")[0] for attempt in attempts]
    assert times == sorted(times)


def test_states_are_overwritten_and_backbones_are_not(place: str) -> None:
    ledger = Ledger(place)

    assert next(ledger.saved_states(trial(1)), None) is None
    ledger.put_state(trial(1), b"one")
    ledger.put_state(trial(1), b"two")
    assert next(ledger.saved_states(trial(1)), None) == b"two"
    assert ledger.states() == {trial(1)}
    ledger.drop_state(trial(1))
    ledger.drop_state(trial(1))
    assert ledger.states() == set()
    assert ledger.put_backbone(trial(1), b"one")
    assert not ledger.put_backbone(trial(1), b"two")
    assert ledger.backbones() == {trial(1)}
    assert ledger.backbone_file(trial(1)).read_bytes() == b"one"
    assert ledger.backbone_file(trial(1)).suffix == ".safetensors"
    with pytest.raises(LedgerError, match=rf"{trial(2)}\.safetensors: missing; .*run the sweep"):
        ledger.backbone_file(trial(2))
    with pytest.raises(ValueError, match="no trial id"):
        ledger.put_state("../x", b"")


def test_the_furthest_state_counts_whoever_wrote_it_and_whenever(place: str) -> None:
    ledger = Ledger(place)
    name = trial(1)

    ledger.save_state(name, b"at 9", step=9, attempt="b")
    ledger.save_state(name, b"at 100", step=100, attempt="b")
    assert ledger.usage()["states"][0] == 1  # what it passed is dropped
    ledger.save_state(name, b"of one that was cut off", step=50, attempt="a")

    assert next(ledger.saved_states(name), None) == b"at 100"
    assert ledger.states() == {name}
    ledger.put_state(name, b"the end")
    ledger.save_state(name, b"of one that comes very late", step=60, attempt="a")
    assert next(ledger.saved_states(name), None) == b"the end"
    assert list(ledger.saved_states(name)) == [b"the end", b"of one that comes very late"]
    ledger.drop_state(name)
    assert ledger.states() == set()


@pytest.mark.parametrize("how", ["further", "end", "dropped"])
def test_states_that_go_between_their_listing_and_their_reading(
    place: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, late = Ledger(place), Ledger(place)
    name = trial(1)
    ledger.save_state(name, b"at 10", step=10, attempt="a")
    get = ledger.storage.get
    others: dict[str, Callable[[], None]] = {
        "further": lambda: late.save_state(name, b"at 20", step=20, attempt="b"),
        "end": lambda: late.put_state(name, b"the end"),
        "dropped": lambda: late.drop_state(name),
    }

    def got(name: str) -> bytes | None:
        data = get(name)
        if how in others:  # the first that is looked for, the end, is not there yet
            others.pop(how)()
        return data

    monkeypatch.setattr(ledger.storage, "get", got)

    found = {"further": [b"at 20"], "end": [b"the end"], "dropped": []}
    assert list(ledger.saved_states(name)) == found[how]
    assert how not in others


def test_a_state_that_is_listed_and_never_there_is_not_waited_for(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(place)
    monkeypatch.setattr(ledger.storage, "list", lambda prefix: {f"{prefix}/none": Entry(1, "1")})

    assert next(ledger.saved_states(trial(1)), None) is None


def test_a_pause_stands_until_it_is_taken_back_and_is_of_one_sweep(place: str) -> None:
    ledger = Ledger(place)

    ledger.notes.pause("one")
    assert (ledger.notes.paused("one"), ledger.notes.paused("other")) == (True, False)
    ledger.notes.resume("one")
    ledger.notes.resume("one")
    assert not ledger.notes.paused("one")
    assert not ledger.holders("")


def test_a_damaged_note_of_what_a_sweep_had_is_no_note(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.notes.save_trial_list("one", {trial(1): "a/0"})

    assert ledger.notes.trial_list("one") == {trial(1): "a/0"}
    for damage in ("", "[1]", "{"):
        (tmp_path / "cache/sweep-one.json").write_text(damage)
        assert ledger.notes.trial_list("one") == {}


def test_where_a_backbone_of_a_bucket_is_kept(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(bucket)
    ledger.put_backbone(trial(1), b"one")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FPT_SWEEP_CACHE")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tmp_path / ".cache/fpt-sweep/backbones" == ledger.backbone_file(trial(1)).parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg/fpt-sweep/backbones" == ledger.backbone_file(trial(1)).parent
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path / "own"))
    assert tmp_path / "own/backbones" == ledger.backbone_file(trial(1)).parent


def test_what_takes_room_and_making_room(place: str) -> None:
    ledger = Ledger(place)
    fill(ledger, [1, 2])
    for number in (1, 2):
        ledger.fail(failure(number))
        ledger.put_state(trial(number), b"x" * 10)
        ledger.put_backbone(trial(number), b"x" * 20)
        for segment in range(3):
            ledger.append_curve(trial(number), "a1", segment, [point(0)])
    ledger.trials()
    lease = ledger.lease("driver")
    assert lease is not None
    lease.release()

    usage = ledger.usage()
    assert {kind: count for kind, (count, _) in usage.items()} == {
        "trials": 2,
        "curves": 6,
        "failures": 2,
        "states": 2,
        "backbones": 2,
        "logs": 0,
        "cache": 1,
        "leases": 2,
    }
    assert (usage["states"][1], usage["backbones"][1]) == (20, 40)
    assert ledger.remove("states", [trial(1), trial(3)]) == 1
    assert ledger.states() == {trial(2)}
    assert ledger.remove("curves", [trial(1)]) == 3
    assert ids(ledger.curves()) == [trial(2)]
    assert ledger.remove("failures") == 2
    assert ledger.remove("leases", ["driver"]) == 2
    assert ledger.remove("cache") == 2  # of the trials, and of the curves just read
    assert ledger.backbones() == {trial(1), trial(2)}
    with pytest.raises(ValueError, match="one by one"):
        ledger.remove("trials")
    assert ids(ledger.trials()) == [trial(1), trial(2)]


def test_a_ledger_opens_elsewhere_by_its_uri(place: str, tmp_path: Path) -> None:
    ledger = Ledger(place)
    fill(ledger, [1])

    assert Ledger(ledger.uri).done() == {trial(1)}
    assert ledger.local == (None if place.startswith("s3:") else Path(place))


def test_results_are_read_without_torch_ray_or_pandas(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(3))
    ledger.fail(failure())
    ledger.append_curve(trial(0), "a1", 0, [point(0), point(1)])
    program = textwrap.dedent(
        """
        import sys
        from sweep.ledger.ledger import Ledger
        for _ in range(2):
            ledger = Ledger(sys.argv[1])
            ledger.done(), ledger.trials(), ledger.failures(), ledger.curves(), ledger.usage()
            ledger.trials(["000000000001"]), ledger.curves(["000000000000"])
        heavy = {"torch", "ray", "pandas", "mlflow", "obstore"} & sys.modules.keys()
        assert not heavy, heavy
        """
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


def test_values_that_are_not_numbers_stay_what_they_are(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit(row(test_loss=math.nan, train_loss=math.inf, test_accuracy=None))

    read = ledger.trials().to_pylist()[0]

    assert math.isnan(read["test_loss"])
    assert read["train_loss"] == math.inf
    assert read["test_accuracy"] is None
