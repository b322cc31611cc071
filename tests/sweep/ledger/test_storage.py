"""Bytes under names: whole or not at all, one creator, in folders and buckets alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from sweep.ledger.storage import ABANDONED, LedgerError, open_storage


def test_an_object_is_there_once_it_was_written_and_gone_once_it_was_deleted(place: str) -> None:
    storage = open_storage(place)

    assert storage.get("a/x") is None
    assert storage.list("a") == {}
    storage.put("a/x", b"one")
    storage.put("a/b/y", b"")
    assert (storage.get("a/x"), storage.get("a/b/y")) == (b"one", b"")
    assert list(storage.list("a")) == ["a/b/y", "a/x"]
    assert [entry.size for entry in storage.list("a").values()] == [0, 3]
    storage.delete(["a/x", "a/never-there"])
    assert list(storage.list("a")) == ["a/b/y"]


def test_a_listing_tells_that_content_has_changed(place: str) -> None:
    storage = open_storage(place)
    storage.put("a/x", b"one")
    before = storage.list("a")
    assert storage.list("a") == before

    storage.put("a/x", b"two")

    assert storage.list("a") != before
    assert storage.get("a/x") == b"two"


def test_create_never_overwrites(place: str) -> None:
    storage = open_storage(place)

    assert storage.create("a/x", b"mine")
    assert not storage.create("a/x", b"yours")
    assert storage.get("a/x") == b"mine"


def _create(place: str, racer: int) -> list[bool]:
    storage = open_storage(place)
    return [storage.create(f"a/{name}", f"{racer}".encode()) for name in range(20)]


def test_of_many_processes_one_creates(place: str) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        won = list(pool.map(_create, [place] * 4, range(4)))

    assert [sum(name) for name in zip(*won, strict=True)] == [1] * 20
    storage = open_storage(place)
    for name in range(20):
        assert won[int(storage.get(f"a/{name}") or b"")][name]


@pytest.mark.parametrize("moment", ["fsync", "link"])
def test_a_writer_killed_on_the_way_leaves_nothing_where_people_look(
    tmp_path: Path, moment: str
) -> None:
    killed = (
        "import os, signal; from sweep.ledger.storage import open_storage; "
        f"os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        f"open_storage({str(tmp_path)!r}).create('trials/x', b'x' * 100_000)"
    )

    done = subprocess.run([sys.executable, "-c", killed])

    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "trials").iterdir()) == []
    storage = open_storage(tmp_path)
    assert storage.list("trials") == {}
    assert storage.create("trials/x", b"again")


def test_what_killed_writers_staged_is_cleared_once_it_is_old(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    (tmp_path / ".staging").mkdir()
    old, new = tmp_path / ".staging/old", tmp_path / ".staging/new"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)

    storage.check_writable()

    assert not old.exists()
    assert new.exists()


def test_a_full_disk_leaves_no_partial_object(small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("size=64k") / "results"
    storage = open_storage(folder)
    assert storage.create("trials/small", b"x" * 1000)

    with pytest.raises(LedgerError, match=r"trials/large: cannot be written: No space left.*free"):
        storage.create("trials/large", b"x" * 100_000)
    with pytest.raises(LedgerError, match="No space left"):
        storage.put("trials/small", b"x" * 100_000)

    assert [path.name for path in (folder / "trials").iterdir()] == ["small"]
    assert list((folder / ".staging").iterdir()) == []
    assert storage.get("trials/small") == b"x" * 1000


def test_a_read_only_disk_is_read_and_not_written(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=64k")
    open_storage(disk).put("a/x", b"one")
    small_disk("remount,ro")
    storage = open_storage(disk)

    assert storage.get("a/x") == b"one"
    for folder in (disk, disk / "not" / "there"):
        with pytest.raises(LedgerError, match=rf"^{disk}: cannot be written.*--results"):
            open_storage(folder).check_writable()
    with pytest.raises(LedgerError, match="Read-only file system"):
        storage.put("a/y", b"")


def test_checking_makes_no_folder(tmp_path: Path) -> None:
    open_storage(tmp_path / "a" / "b").check_writable()

    assert list(tmp_path.iterdir()) == []


def test_checking_a_bucket_leaves_nothing_behind(bucket: str) -> None:
    storage = open_storage(bucket)

    storage.check_writable()
    storage.put("a/x", b"")

    assert list(storage.list("")) == ["a/x"]


def test_objects_are_for_others_to_read_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        open_storage(tmp_path).put("a/x", b"")
    finally:
        os.umask(before)

    assert (tmp_path / "a/x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gcs://b/x", r"unknown storage gcs://; did you mean gs://\?"),
        ("abfs://b/x", r"did you mean az://\?"),
        ("s33://b/x", r"did you mean s3://\?"),
        ("file:///x", "give the path without file://"),
        ("https://b/x", "a ledger is a local path, s3://BUCKET/PREFIX"),
        ("s3://", "names no bucket"),
        ("az://b", "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_other_places_are_refused(uri: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)

    with pytest.raises(LedgerError, match=said) as caught:
        open_storage(uri)

    assert str(caught.value).startswith(uri.rstrip("/"))


@pytest.mark.parametrize(
    ("uri", "opened"),
    [("s3://b/p/", "s3://b/p"), ("S3://b", "s3://b"), ("gs://b/p/q", "gs://b/p/q")],
)
def test_uris_of_buckets(uri: str, opened: str) -> None:
    assert open_storage(uri).uri == opened
    assert open_storage(Path(uri)).uri == opened.lower()  # a Path swallows one slash


def test_a_relative_path_is_good_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert open_storage("results").uri == str(tmp_path / "results")


def test_files_where_folders_are_needed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LedgerError, match=r"file: is a file; the results must be a folder"):
        open_storage(tmp_path / "file")
    with pytest.raises(LedgerError, match=r"under: cannot be made, since .*file is a file"):
        open_storage(tmp_path / "file" / "under").check_writable()
    with pytest.raises(LedgerError, match="folder is needed"):
        open_storage(tmp_path).put("file/x", b"")
    with pytest.raises(LedgerError, match="folder is needed"):
        open_storage(tmp_path).list("file")


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    storage = open_storage("s3://no-such-bucket/x")

    with pytest.raises(LedgerError, match=r"^s3://no-such-bucket/x/a: cannot be read.*AWS_"):
        storage.list("a")
    with pytest.raises(LedgerError, match=r"^s3://no-such-bucket/x/a/x: cannot be written"):
        storage.put("a/x", b"")
    with pytest.raises(LedgerError, match="cannot be written"):
        storage.create("a/x", b"")


def test_a_create_that_is_repeated_after_a_lost_answer_is_still_ours(bucket: str) -> None:
    storage = open_storage(bucket)
    storage.create("a/x", b"mine, attempt 1")

    assert storage.create("a/x", b"mine, attempt 1")
    assert not storage.create("a/x", b"mine, attempt 2")


def test_a_file_of_a_bucket_is_fetched_once_a_version(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(bucket)
    assert storage.file("a/x.bin", tmp_path) is None
    storage.put("a/x.bin", b"one")

    first = storage.file("a/x.bin", tmp_path)
    assert first is not None
    written = first.stat().st_mtime_ns
    assert storage.file("a/x.bin", tmp_path) == first
    storage.put("a/x.bin", b"two")
    second = storage.file("a/x.bin", tmp_path)

    assert first.stat().st_mtime_ns == written
    assert second is not None
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    assert first.suffix == ".bin"
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".lock"}


def test_a_file_of_a_folder_is_itself(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "results")
    storage.put("a/x", b"one")

    assert storage.file("a/x", tmp_path / "cache") == tmp_path / "results/a/x"
    assert storage.file("a/y", tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_a_trial_goes_with_its_last_file_and_comes_with_the_next(
    tmp_path: Path,
) -> None:
    storage = open_storage(tmp_path)
    folder = f"curves/{7:012x}"
    storage.put(f"{folder}/a", b"1")
    storage.put(f"{folder}/b", b"2")
    storage.put("leases/driver/1.json", b"{}")

    storage.delete([f"{folder}/a"])
    assert storage.get(f"{folder}/b") == b"2"
    storage.delete([f"{folder}/b", "leases/driver/1.json"])

    assert not (tmp_path / folder).exists()
    assert (tmp_path / "leases/driver").is_dir()  # of others there are few
    assert storage.create(f"{folder}/c", b"3")
    assert storage.get(f"{folder}/c") == b"3"


def test_writers_beside_who_deletes_the_last_file_of_a_folder_lose_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    folder = f"curves/{7:012x}"

    def write(number: int) -> None:
        storage.put(f"{folder}/kept-{number}", b"x")

    def delete(number: int) -> None:
        storage.put(f"{folder}/gone-{number}", b"x")
        storage.delete([f"{folder}/gone-{number}"])

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(what, number) for number in range(40) for what in (write, delete)]
        assert [one.result() for one in done] == [None] * 80

    assert len(storage.list(folder)) == 40


def test_names_that_begin_alike_are_found_among_many(place: str) -> None:
    storage = open_storage(place)
    for name in ("0a", "segment-1", "segment-2", "segments", "z", "segment-3/of-a-folder"):
        storage.put(f"trials/{name}", name.encode())
    storage.put("curves/segment-9", b"9")

    found = storage.beginning("trials", "segment-")

    assert {"trials/segment-1", "trials/segment-2"} <= found.keys()
    assert all(name.startswith("trials/segment-") for name in found)
    listed = storage.list("trials")
    assert {name: found[name] for name in ("trials/segment-1", "trials/segment-2")} == {
        name: listed[name] for name in ("trials/segment-1", "trials/segment-2")
    }
    assert storage.beginning("nowhere", "segment-") == {}
