"""Compaction: whoever is killed and whoever else is at work, each row is there and counts once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.ledger import compaction
from sweep.ledger.ledger import AlreadyOurs, Committed, Ledger, LedgerError, TakenBy
from sweep.ledger.storage import StorageError

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def trial(number: int) -> str:
    """A trial id."""
    return f"{number:012x}"


def row(number: int, by: str = "a", **columns: Any) -> dict[str, Any]:
    """A row of a trial."""
    ids = {"trial_id": trial(number), "cell_id": trial(0), "attempt": by}
    return ids | {"outcome": "done", "seed": number, "test_loss": float("nan")} | columns


def point(step: int, loss: float = 0.0, split: str = "train") -> dict[str, Any]:
    """A point of a curve."""
    return {"step": step, "split": split, "loss": loss}


def failure(number: int, by: str, message: str = "") -> dict[str, Any]:
    """A note of a failed attempt."""
    own = {"trial_id": trial(number), "attempt": by, "message": message}
    return {"cause": "worker", "at": NOW + timedelta(seconds=number)} | own


def fill(ledger: Ledger, numbers: Iterable[int], by: str = "a") -> None:
    """Finish trials: a curve in two pieces that overlap, for every third a failure, and a row."""
    for number in numbers:
        ledger.append_curve(trial(number), by, 0, [point(0), point(1), point(2, 2.0)])
        ledger.append_curve(trial(number), by, 1, [point(2, 3.0), point(3), point(3, 1.0, "test")])
        if number % 3 == 0:
            ledger.fail(failure(number, by))
        ledger.commit(row(number, by))


def seen(ledger: Ledger) -> dict[str, list[str]]:
    """All that readers see, NaN by its name."""
    tables = (ledger.trials(), ledger.failures(), ledger.curves())
    out = {str(n): [repr(one) for one in t.to_pylist()] for n, t in enumerate(tables)}
    assert sorted(ledger.done()) == [one["trial_id"] for one in tables[0].to_pylist()]
    return out


def files(place: str | Path) -> list[str]:
    """The names of the files of rows, without the cache."""
    ledger = Ledger(place)
    names = [n for kind in ("trials", "failures", "curves") for n in ledger.storage.list(kind)]
    return sorted(names)


SEGMENTS = [f"{kind}/segment-000001.parquet" for kind in ("curves", "failures", "trials")]


def test_readers_see_the_same_rows_before_and_after(place: str) -> None:
    ledger = Ledger(place)
    fill(ledger, range(40))
    long_lived = Ledger(place)
    before, still = seen(long_lived), long_lived.snapshot()
    some = {trial(number) for number in (3, 5, 99)}
    few = Ledger(place).trials(some), Ledger(place).curves(some), Ledger(place).failures(some)

    done = ledger.compact()

    assert (done.trials, done.segments, done.files) == (40, 3, 40 + 80 + 14)
    assert files(place) == SEGMENTS
    for reader in (ledger, long_lived, Ledger(place), still, Ledger(place).snapshot()):
        assert seen(reader) == before
    again = Ledger(place)
    found = again.trials(some), again.curves(some), again.failures(some)
    for one, other in zip(found, few, strict=True):
        assert [*map(repr, one.to_pylist())] == [*map(repr, other.to_pylist())]
    assert again.trials(columns=["seed", "trial_id"]).column_names == ["seed", "trial_id"]
    assert again.trials(columns=["seed"]).column(0).to_pylist() == list(range(40))
    assert not any(again.damaged(kind) for kind in ("trials", "failures", "curves"))  # type: ignore[arg-type]
    assert ledger.compact() == compaction.Compacted()


def test_what_comes_after_a_compaction_goes_into_the_next_segment(place: str) -> None:
    fill(Ledger(place), range(0, 20, 2))
    Ledger(place).compact()
    fill(Ledger(place), range(1, 20, 2))
    Ledger(place).append_curve(trial(4), "z", 0, [point(9, 5.0), point(0, 4.0)])  # a late worker
    before = seen(Ledger(place))
    assert Ledger(place).compact(at_least=11) == compaction.Compacted()

    assert Ledger(place).compact(at_least=10).trials == 10

    assert len(files(place)) == 6
    assert seen(Ledger(place)) == before
    curve = Ledger(place).curves([trial(4)]).select(["step", "split", "loss"]).to_pylist()
    assert [tuple(one.values()) for one in curve] == [
        (3, "test", 1.0), (0, "train", 4.0), (1, "train", 0.0), (2, "train", 3.0),
        (3, "train", 0.0), (9, "train", 5.0),
    ]  # fmt: skip
    assert Ledger(place).trials().column("seed").to_pylist() == list(range(20))


def test_pandas_reads_a_folder_of_segments_and_files(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    fill(Ledger(tmp_path), range(10))
    before = pandas.read_parquet(tmp_path / "trials").sort_values("trial_id", ignore_index=True)
    Ledger(tmp_path).compact()
    fill(Ledger(tmp_path), [10, 11])

    after = pandas.read_parquet(tmp_path / "trials").sort_values("trial_id", ignore_index=True)

    assert list(after.columns) == list(before.columns)
    pandas.testing.assert_frame_equal(after.head(10), before, check_dtype=False)
    assert after.trial_id.tolist() == [trial(number) for number in range(12)]
    assert len(pandas.read_parquet(tmp_path / "curves")) == 12 * 6


def test_trials_that_run_and_rows_of_own_code_stay_in_their_files(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(3))
    ledger.append_curve(trial(7), "a", 0, [point(0)])
    ledger.fail(failure(7, "a"))
    ledger.append_curve(trial(8), "a", 0, [point(0)])
    ledger.commit(row(8, own_code='{"mine.py": "00"}'))

    ledger.compact()
    ledger.recommit(row(8, "b", own_code='{"mine.py": "11"}'))
    ledger.compact()

    left = [name for name in files(tmp_path) if "segment" not in name]
    assert left == [
        f"curves/{trial(7)}/a-000000.parquet", f"curves/{trial(8)}/a-000000.parquet",
        f"failures/{trial(7)}-a.parquet", f"trials/{trial(8)}.parquet",
    ]  # fmt: skip
    assert ledger.trials([trial(8)]).column("attempt").to_pylist() == ["b"]
    assert {path.name for path in (tmp_path / "curves").iterdir()} == {
        "segment-000001.parquet", trial(7), trial(8)
    }  # fmt: skip


def test_the_first_commit_wins_after_a_compaction_too(place: str) -> None:
    ledger = Ledger(place)
    fill(ledger, range(3))
    ledger.compact()

    assert Ledger(place).commit(row(1, "late")) == TakenBy("a")
    assert Ledger(place).commit(row(1, "a")) == AlreadyOurs()  # once more: its answer was lost
    assert ledger.trials().column("attempt").to_pylist() == ["a"] * 3
    # Of one that is cut off before it looks whether it was the first.
    Ledger(place).storage.create(f"trials/{trial(2)}.parquet", _encoded(row(2, "late")))
    for reader in (ledger, Ledger(place)):
        assert reader.trials().column("attempt").to_pylist() == ["a"] * 3
        assert reader.trials([trial(2)]).column("attempt").to_pylist() == ["a"]
    ledger.compact()
    assert f"trials/{trial(2)}.parquet" not in files(place)
    assert ledger.trials().column("attempt").to_pylist() == ["a"] * 3


def _encoded(one: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Ledger(folder).commit(one)
        return (Path(folder) / f"trials/{one['trial_id']}.parquet").read_bytes()


def test_a_note_that_is_written_anew_takes_the_place_of_the_first(place: str) -> None:
    ledger = Ledger(place)
    fill(ledger, [3])
    ledger.compact()
    ledger.fail(failure(3, "a", "more is known"))
    ledger.compact()

    assert ledger.failures().column("message").to_pylist() == ["more is known"]
    assert Ledger(place).failures([trial(3)]).column("message").to_pylist() == ["more is known"]


def test_a_damaged_file_stays_and_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(4))
    bad = tmp_path / f"trials/{trial(2)}.parquet"
    bad.write_bytes(bad.read_bytes()[:-1])

    ledger.compact()

    assert bad.exists()
    assert sorted(ledger.done()) == [trial(number) for number in range(4)]
    assert ledger.trials(strict=False).column("seed").to_pylist() == [0, 1, 3]
    with pytest.raises(LedgerError, match=rf"{bad}: cannot be read"):
        ledger.trials()


@pytest.mark.parametrize("how", ["cut", "flipped", "disordered"])
def test_a_damaged_segment_is_named_and_nothing_is_trained_anew_unasked(
    tmp_path: Path, how: str
) -> None:
    fill(Ledger(tmp_path), range(40))
    Ledger(tmp_path).compact()
    fill(Ledger(tmp_path), [40])
    segment = tmp_path / "trials/segment-000001.parquet"
    data = segment.read_bytes()
    if how == "cut":
        segment.write_bytes(data[:-1])
    elif how == "flipped":
        place = pq.read_metadata(segment).row_group(0).column(0).dictionary_page_offset + 60
        segment.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        table = pq.read_table(segment)
        meta = {"schema_version": "5"}
        pq.write_table(table.take(list(range(39, -1, -1))).replace_schema_metadata(meta), segment)

    for ledger in (Ledger(tmp_path), Ledger(tmp_path).snapshot()):
        with pytest.raises(LedgerError, match=rf"^{segment}: cannot be read .*trained anew"):
            ledger.done()
        with pytest.raises(LedgerError, match=rf"^{segment}: "):
            ledger.trials()
        with pytest.raises(LedgerError, match=rf"^{segment}: "):
            ledger.trials([trial(0)])
    assert len(Ledger(tmp_path).damaged()) == 1
    assert Ledger(tmp_path).trials(strict=False).column("seed").to_pylist() == [40]
    with pytest.raises(LedgerError, match=rf"{segment}"):
        Ledger(tmp_path).compact()
    segment.write_bytes(data)
    assert len(Ledger(tmp_path).done()) == 41


# --- kills, and others ----------------------------------------------------------------------------


class Kill(BaseException):
    """Ends a compaction where it stands."""


WRITES = ("create", "delete", "put")


def stopped_at(ledger: Ledger, most: int, stop: Callable[[], object]) -> Iterator[int]:
    """Let each request of the storage but the first ones be preceded by `stop`; and files be
    deleted one by one.
    """
    count = [0]
    storage = ledger.storage
    real = {name: getattr(storage, name) for name in (*WRITES, "get", "list", "beginning")}

    def before(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name == "delete":
                for one in list(arguments[0]):
                    count[0] += 1
                    if count[0] > most:
                        stop()
                    real[name]([one])
                return None
            count[0] += 1
            if count[0] > most:
                stop()
            return real[name](*arguments)

        return call

    for name in real:
        setattr(storage, name, before(name))
    yield count[0]


def killed(place: str | Path, most: int, error: type[BaseException] = Kill) -> bool:
    """Compact until so many requests were made; return whether that was not all."""

    def stop() -> None:
        raise error("away")

    ledger = Ledger(place)
    next(stopped_at(ledger, most, stop))
    try:
        ledger.compact()
    except (Kill, StorageError):
        return True
    return False


@pytest.mark.parametrize("error", [Kill, StorageError])
def test_killed_at_any_request_nothing_is_lost_or_doubled(
    tmp_path: Path, error: type[BaseException]
) -> None:
    fill(Ledger(tmp_path), [0, 2])
    Ledger(tmp_path).compact()
    fill(Ledger(tmp_path), [1, 3])
    before = seen(Ledger(tmp_path))
    most = 0
    while killed(tmp_path, most, error):
        assert seen(Ledger(tmp_path)) == before
        most += 1
        if most % 7 == 0:  # else each goes on where the last one was killed
            assert len(files(tmp_path)) >= 6
    assert most > 10
    assert seen(Ledger(tmp_path)) == before
    kinds = ("curves", "failures", "trials")
    assert files(tmp_path) == [f"{k}/segment-00000{n}.parquet" for k in kinds for n in (1, 2)]


@pytest.mark.parametrize("most", range(0, 40, 3))
def test_one_that_sleeps_anywhere_while_another_compacts_does_no_harm(
    tmp_path: Path, most: int
) -> None:
    fill(Ledger(tmp_path), range(4))
    before = seen(Ledger(tmp_path))
    slow, woken = Ledger(tmp_path), []

    def stop() -> None:
        if not woken:
            woken.append(True)
            Ledger(tmp_path).compact()
            fill(Ledger(tmp_path), [9])
            Ledger(tmp_path).compact()
            assert seen(Ledger(tmp_path)).keys() == before.keys()

    next(stopped_at(slow, most, stop))
    slow.compact()

    with tempfile.TemporaryDirectory() as folder:
        fill(Ledger(folder), [*range(4), *([9] if woken else [])])
        assert seen(Ledger(tmp_path)) == seen(Ledger(folder))
    assert not [name for name in files(tmp_path) if "segment" not in name]
    _each_once(tmp_path)


def _each_once(place: Path) -> None:
    """Fail where two segments have rows of one trial."""
    for kind in ("trials", "failures", "curves"):
        tables = [pq.read_table(one) for one in (place / kind).glob("segment-*")]
        owners = [set(table.column("trial_id").to_pylist()) for table in tables]
        assert sum(map(len, owners)) == len(set().union(*owners)), kind


@pytest.mark.parametrize("most", range(9))
def test_a_reader_sees_all_rows_whatever_goes_while_it_reads(place: str, most: int) -> None:
    fill(Ledger(place), range(40))
    before = seen(Ledger(place))
    for cold in (False, True):
        reader = Ledger(place)
        if not cold:
            seen(reader)
        else:
            reader.remove("cache")
        gone: list[bool] = []

        def stop(gone: list[bool] = gone) -> None:
            if not gone:
                gone.append(True)
                Ledger(place).compact()

        next(stopped_at(reader, most, stop))
        assert seen(reader) == before
        assert seen(reader) == before


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("finish"), st.integers(0, 9), st.sampled_from("ab")),
        st.tuples(st.just("piece"), st.integers(0, 9), st.integers(0, 2)),
        st.tuples(st.just("fail"), st.integers(0, 9), st.sampled_from("ab")),
        st.tuples(st.just("compact"), st.integers(0, 60), st.just(0)),
        st.tuples(st.just("forget"), st.integers(0, 9), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=30, deadline=None)
@given(operations=OPERATIONS)
def test_a_ledger_is_a_dict_whoever_compacts_and_dies(
    operations: Sequence[tuple[str, int, Any]],
) -> None:
    rows: dict[str, str] = {}
    notes: dict[tuple[str, str], str] = {}
    pieces: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        for number, (what, of, more) in enumerate(operations):
            was = dict(rows)
            if what == "finish":
                there = rows.get(trial(of))
                first = Committed() if there is None else TakenBy(there)
                assert ledger.commit(row(of, more)) == (AlreadyOurs() if there == more else first)
                rows.setdefault(trial(of), more)
            elif what == "piece":
                ledger.append_curve(trial(of), "a", more, [point(0, float(number))])
                pieces[trial(of), more] = number
            elif what == "forget":
                assert ledger.forget(trial(of)) == (rows.pop(trial(of), None) is not None)
                if was != rows:
                    pieces = {key: n for key, n in pieces.items() if key[0] != trial(of)}
            elif what == "fail":
                ledger.fail(failure(of, more, str(number)))
                notes[trial(of), more] = str(number)
            else:
                killed(folder, of)
        curves = {t: float(pieces[t, max(n for o, n in pieces if o == t)]) for t, _ in pieces}
        for reader in (ledger, Ledger(folder)):
            table = reader.trials(columns=["trial_id", "attempt"])
            assert table.to_pylist() == [
                {"trial_id": name, "attempt": rows[name]} for name in sorted(rows)
            ]
            told = reader.failures(columns=["trial_id", "attempt", "message", "cause"]).to_pylist()
            failed = [one for one in told if one.pop("cause") == "worker"]
            assert [tuple(one.values()) for one in failed] == [
                (*key, notes[key]) for key in sorted(notes)
            ]
            curve = reader.curves(columns=["trial_id", "loss"]).to_pylist()
            assert [tuple(one.values()) for one in curve] == sorted(curves.items())


def _forget_until(place: Path, number: int, most: int, error: type[BaseException]) -> bool:
    """Forget a trial until so many requests were made; return whether that was not all."""

    def stop() -> None:
        raise error("away")

    ledger = Ledger(place)
    next(stopped_at(ledger, most, stop))
    try:
        ledger.forget(trial(number))
    except (Kill, StorageError):
        return True
    finally:
        Ledger(place).remove("leases")  # who is gone holds none; this process lives on
    return False


@pytest.mark.parametrize("compacted", ["loose", "segment", "both", "alone"])
@pytest.mark.parametrize("error", [Kill, StorageError])
def test_who_forgets_and_is_killed_leaves_the_row_or_the_mark(
    tmp_path: Path, compacted: str, error: type[BaseException]
) -> None:
    others, most = [1, 2, 3], 0
    with tempfile.TemporaryDirectory() as folder:
        fill(Ledger(folder), others)
        expected = seen(Ledger(folder))
    fill(Ledger(tmp_path), [5])
    if compacted == "alone":
        Ledger(tmp_path).compact()
    fill(Ledger(tmp_path), others)
    if compacted != "loose":
        loose = {n: (tmp_path / n).read_bytes() for n in files(tmp_path) if trial(5) in n}
        Ledger(tmp_path).compact()
        for name, data in loose.items() if compacted == "both" else ():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
    Ledger(tmp_path).save_state(trial(5), b"half", step=3, attempt="a")
    Ledger(tmp_path).put_backbone(trial(5), b"what it trained")

    while _forget_until(tmp_path, 5, most, error):
        most += 1
        now = Ledger(tmp_path)
        marked = trial(5) in now.last_notes([trial(5)])
        assert trial(5) in now.done() or marked
        if trial(5) not in now.done():
            assert not now.states() | now.backbones()
            assert now.curves([trial(5)]).num_rows == 0
        for kind in ("trials", "curves"):
            table = getattr(now, kind)([trial(number) for number in others])
            assert [*map(repr, table.to_pylist())] == expected["0" if kind == "trials" else "2"]
        _each_once(tmp_path)

    assert most > 8
    after = seen(Ledger(tmp_path))
    assert (after["0"], after["2"]) == (expected["0"], expected["2"])
    assert Ledger(tmp_path).last_notes([trial(5)])[trial(5)]["cause"] == "forgotten"
    assert "attempt a" in Ledger(tmp_path).last_notes([trial(5)])[trial(5)]["message"]
    assert Ledger(tmp_path).last_failures([trial(5)]) == {}


def test_a_trial_that_was_forgotten_may_be_finished_again_and_compacted(place: str) -> None:
    ledger, reader = Ledger(place), Ledger(place)
    fill(ledger, range(6))
    ledger.compact()
    before, still = seen(reader), reader.snapshot()
    seen(still)

    assert ledger.forget(trial(3))
    assert not ledger.forget(trial(3))
    assert trial(3) not in reader.done()
    assert sorted(seen(Ledger(place))["0"]) == [one for one in before["0"] if trial(3) not in one]
    ledger.append_curve(trial(3), "z", 0, [point(7, 5.0)])
    assert ledger.commit(row(3, "z")) == Committed()
    for _ in range(2):
        assert ledger.commit(row(3, "y")) == TakenBy("z")
        for one in (ledger, reader, Ledger(place)):
            assert one.committed_by(trial(3)) == "z"
            assert one.trials(columns=["seed"]).column(0).to_pylist() == list(range(6))
            curve = one.curves([trial(3)], columns=["step", "loss"]).to_pylist()
            assert curve == [{"step": 7, "loss": 5.0}]
        ledger.compact()
    assert len([name for name in files(place) if name.startswith("trials/")]) == 2
    assert not any(Ledger(place).damaged(kind) for kind in ("trials", "failures", "curves"))  # type: ignore[arg-type]


def test_the_last_row_of_a_segment_takes_it_along(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), [1])
    Ledger(tmp_path).compact()

    assert Ledger(tmp_path).forget(trial(1))

    assert [name for name in files(tmp_path) if not name.startswith("failures/")] == []
    assert Ledger(tmp_path).done() == set()


def test_only_one_forgets_at_a_time(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), [1])
    lease = Ledger(tmp_path).lease("forget")
    assert lease is not None
    with lease, pytest.raises(LedgerError, match="another process forgets a trial"):
        Ledger(tmp_path).forget(trial(1))

    assert Ledger(tmp_path).forget(trial(1))


def test_many_at_once_write_each_row_once(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(30))
    before = seen(Ledger(tmp_path))

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: Ledger(tmp_path).compact(), range(4)))

    assert sum(one.trials for one in done) == 30
    assert seen(Ledger(tmp_path)) == before
    assert not [name for name in files(tmp_path) if "segment" not in name]
    _each_once(tmp_path)


def test_segments_are_cut_between_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MOST", {"trials": 10, "failures": 4, "curves": 30})
    monkeypatch.setattr(compaction, "BATCH", 5)
    fill(Ledger(tmp_path), range(25))
    before = seen(Ledger(tmp_path))

    assert Ledger(tmp_path).compact().trials == 25

    assert len(list((tmp_path / "trials").glob("segment-*"))) == 3
    assert len(list((tmp_path / "curves").glob("segment-*"))) == 5
    assert seen(Ledger(tmp_path)) == before
    _each_once(tmp_path)


COMPACT = """
import sys
from sweep.ledger import compaction
from sweep.ledger.ledger import Ledger
compaction.MOST.update(trials=20, failures=20, curves=60)
compaction.BATCH = 5
print("ready", flush=True)
while True:
    Ledger(sys.argv[1]).compact()
"""


@pytest.mark.slow
def test_kill_9_beside_writers_loses_nothing(tmp_path: Path) -> None:
    place = tmp_path / "results"
    for number in range(60):
        command = [sys.executable, "-c", COMPACT, str(place)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        mine = range(10 * number, 10 * number + 10)
        fill(Ledger(place), mine)
        assert {trial(one) for one in mine} <= Ledger(place).done()
        time.sleep(max(0.0, 0.013 * (number % 23) - (time.monotonic() - began)))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with tempfile.TemporaryDirectory() as folder:
        fill(Ledger(folder), range(600))
        expected = seen(Ledger(folder))
        assert seen(Ledger(place)) == expected
        Ledger(place).compact()
        assert seen(Ledger(place)) == expected
        assert not [name for name in files(place) if "segment" not in name]
        _each_once(place)
