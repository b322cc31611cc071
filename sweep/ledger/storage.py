"""Storage: bytes under names, in a folder or in a bucket.

Names are relative and posix (`trials/0123456789ab.parquet`). Three promises hold on both: an object
appears whole or not at all, also when its writer is killed or the disk is full; `create` succeeds
for exactly one of many writers; a listing shows what has been written.

A folder is written with plain system calls and not through obstore, whose local store stages a
file beside its final name: a killed writer would leave `x.parquet#1` in a folder that people open
with `pandas.read_parquet`. We stage in `.staging/`, sync, and link.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
}
"""Object storage that is known, with the environment variables that open it."""

ABANDONED = 24 * 3600.0
"""Seconds after which a staged file can only be what a killed writer left."""


FRESH = 2_000_000_000
"""Nanoseconds for which a change of a folder may not be told from the one before it."""


class LedgerError(Exception):
    """The ledger cannot be read or written; a message for people: where, what, what to do."""


class StorageError(LedgerError):
    """The storage failed, and may come back: full, read-only, not reachable."""


class Entry(NamedTuple):
    """An object in a listing. Two equal entries under one name are the same content."""

    size: int
    """Bytes."""
    stamp: str
    """Modification time and inode (folder), or ETag (bucket)."""


class Storage(Protocol):
    """Bytes under names. Every method raises LedgerError where the storage fails."""

    uri: str
    """Absolute folder, or scheme://bucket/prefix."""
    threads: int
    """Reads at a time that pay: a folder is bound by the processor, a bucket by latency."""

    def get(self, name: str) -> bytes | None:
        """Return the content, or None if there is no such object."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write, or replace whole."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write unless something is there. True if this call made the object."""
        ...

    def list(self, prefix: str) -> dict[str, Entry]:
        """Return the objects below a folder, sorted by name; empty if there is no such folder."""
        ...

    def beginning(self, folder: str, start: str) -> dict[str, Entry]:
        """Return the objects directly in a folder whose names begin so, sorted by name."""
        ...

    def holds(self, prefix: str) -> bool:
        """Return whether there is anything below a folder."""
        ...

    def stamps(self, prefix: str) -> dict[str, str] | None:
        """Return what is directly in a folder, sorted by name, each with a stamp that changes with
        a file's content and with what a folder holds; None where there are no folders.
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        ...

    def file(self, name: str, cache: Path) -> Path | None:
        """Return a local file with the content (in `cache`, if it has to be fetched), or None."""
        ...

    def check_writable(self) -> None:
        """Raise LedgerError if nothing can be written here; a folder is not made for it."""
        ...

    def where(self, name: str) -> str:
        """Return the path or URI of an object, for messages."""
        ...


def open_storage(results: str | Path) -> Storage:
    """Open the storage at a local path, s3://, gs:// or az:// URI.

    Raises:
        LedgerError: If it is none of them, or a path that is a file.
    """
    text = str(results)
    if not text:
        raise LedgerError("results: empty; name a folder, such as `results`, or a bucket")
    if not (scheme := re.match(r"([A-Za-z][\w+.-]*):/", text)):
        return Folder(Path(text).expanduser().absolute())
    name = scheme[1].lower()
    allowed = (
        "a ledger is a local path, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
    )
    if name not in SCHEMES:
        meant = {"gcs": "gs", "abfs": "az", "abfss": "az", "azure": "az", "s3a": "s3", "s3n": "s3"}
        close = [meant[name]] if name in meant else difflib.get_close_matches(name, SCHEMES, n=1)
        hint = f"did you mean {close[0]}://? " if close else ""
        hint = "give the path without file://; " if name == "file" else hint
        raise LedgerError(
            f"{text}: cannot hold a ledger: unknown storage {name}://; {hint}{allowed}"
        )
    bucket, _, prefix = text[scheme.end() :].lstrip("/").partition("/")
    if not bucket:
        raise LedgerError(f"{text}: names no bucket; {allowed}")
    return Bucket(name, bucket, prefix.strip("/"))


_OF_A_TRIAL = re.compile(r"[0-9a-f]{12}")
# Folders that go with the last of their files: one for each trial is many.

_FOR_GOOD = (
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV,
    errno.ENAMETOOLONG,
)  # fmt: skip
# What waiting does not mend.


class Folder:
    """Storage in a local folder, which is made when something is written."""

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise LedgerError(f"{root}: is a file; the results must be a folder")
        self.root = root
        self.uri = str(root)
        self.threads = min(4, os.cpu_count() or 1)

    def get(self, name: str) -> bytes | None:
        """Return the content, or None if there is no such object."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(name, "read", error) from error

    def put(self, name: str, data: bytes) -> None:
        """Write, or replace whole."""
        with self._staged(name, data) as (staged, target):
            _into_folder(target, lambda: staged.replace(target))

    def create(self, name: str, data: bytes) -> bool:
        """Write unless something is there. True if this call made the object."""
        with self._staged(name, data) as (staged, target):
            try:
                _into_folder(target, lambda: os.link(staged, target))
            except FileExistsError:
                # NFS may answer so to the very client that made the link: count the links.
                return staged.stat().st_nlink > 1
        return True

    def list(self, prefix: str) -> dict[str, Entry]:
        """Return the objects below a folder, sorted by name; empty if there is no such folder."""
        found: dict[str, Entry] = {}
        folders = [prefix]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}"
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir():
                            folders.append(name)
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            stat = entry.stat()
                            # Modification times are coarse; a new file is a new inode too.
                            found[name] = Entry(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._error(folder, "read", error) from error
        return dict(sorted(found.items()))

    def beginning(self, folder: str, start: str) -> dict[str, Entry]:
        """Return the objects directly in a folder whose names begin so, sorted by name."""
        found: dict[str, Entry] = {}
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(start):
                        with contextlib.suppress(FileNotFoundError):
                            stat = entry.stat()
                            stamp = f"{stat.st_mtime_ns}-{stat.st_ino}"
                            found[f"{folder}/{entry.name}"] = Entry(stat.st_size, stamp)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._error(folder, "read", error) from error
        return dict(sorted(found.items()))

    def holds(self, prefix: str) -> bool:
        """Return whether there is anything in a folder."""
        try:
            with os.scandir(self.root / prefix) as entries:
                return any(not entry.name.startswith(".") for entry in entries)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._error(prefix, "read", error) from error

    def stamps(self, prefix: str) -> dict[str, str] | None:
        """Return what is directly in a folder, sorted by name, with stamps. A folder just changed
        has a new one each time, since the next change may fall into the same tick of the clock.
        """
        found: dict[str, str] = {}
        now = time.time_ns()
        try:
            with os.scandir(self.root / prefix) as entries:
                for entry in entries:
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:
                        continue
                    at = stat.st_mtime_ns
                    if not S_ISDIR(stat.st_mode):
                        stamp = f"{stat.st_size}-{at}-{stat.st_ino}"
                    elif at > now - FRESH:
                        stamp = f"{at}-{stat.st_ino}-{now}"
                    else:
                        stamp = f"{at}-{stat.st_ino}"
                    found[entry.name] = stamp
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._error(prefix, "read", error) from error
        return {f"{prefix}/{name}": found[name] for name in sorted(found)}

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        folders = set()
        for name in names:
            path = self.root / name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise self._error(name, "removed", error) from error
            if _OF_A_TRIAL.fullmatch(path.parent.name):
                folders.add(path.parent)
        for folder in folders:
            with contextlib.suppress(OSError):  # something is left in it
                folder.rmdir()

    def file(self, name: str, cache: Path) -> Path | None:
        """Return the file itself."""
        path = self.root / name
        return path if path.is_file() else None

    def check_writable(self) -> None:
        """Raise LedgerError if nothing can be written here, and clear what killed writers left."""
        there = self.root
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise LedgerError(f"{self.root}: cannot be made, since {there} is a file")
        # access() knows read-only mounts too, which bind even root.
        if not os.access(there, os.W_OK | os.X_OK):
            raise LedgerError(
                f"{there}: cannot be written, so that no result could be kept; make it writable, "
                "or choose another folder with --results"
            )
        with contextlib.suppress(OSError), os.scandir(self.root / ".staging") as leftovers:
            for entry in leftovers:
                if time.time() - entry.stat().st_mtime > ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)

    def where(self, name: str) -> str:
        """Return the path of an object."""
        return str(self.root / name)

    @contextmanager
    def _staged(self, name: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """Yield a synced file with the content, and its target; then sync the target's folder."""
        target = self.root / name
        staged = self.root / ".staging" / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            staged.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # "x", since a second writer here would be a bug; mode as the umask says, since
                # results are for others to read (tempfile's are not).
                with staged.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                yield staged, target
            finally:
                staged.unlink(missing_ok=True)
            _sync_folder(target.parent)
        except OSError as error:
            raise self._error(name, "written", error) from error

    def _error(self, name: str, what: str, error: OSError) -> LedgerError:
        advice = {
            errno.ENOSPC: "free some space and run again: what is finished is kept",
            errno.EDQUOT: "free some space and run again: what is finished is kept",
            errno.EROFS: "choose another folder with --results",
            errno.EACCES: "ask whose it is to make it readable (chmod -R g+rX, and umask 027 from "
            "then on)"
            if what == "read"
            else "make it writable, or choose another folder with --results",
            errno.ENOTDIR: "something in this path is a file where a folder is needed",
            errno.EEXIST: "something in this path is a file where a folder is needed",
            errno.EPERM: "this file system may lack hard links, which a ledger needs: choose "
            "another folder with --results",
            errno.EOPNOTSUPP: "this file system lacks hard links, which a ledger needs: choose "
            "another folder with --results",
            errno.EXDEV: "a ledger must lie on one file system",
        }.get(error.errno or 0)
        reason = error.strerror or str(error)
        kind = LedgerError if error.errno in _FOR_GOOD else StorageError
        return kind(
            f"{self.where(name)}: cannot be {what}: {reason}" + (f"; {advice}" if advice else "")
        )


def _into_folder(target: Path, place: Callable[[], object]) -> None:
    """Give a file its name; its folder may have gone with the last of the others just now."""
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):
            place()
            return
        target.parent.mkdir(parents=True, exist_ok=True)
    place()


def _sync_folder(folder: Path) -> None:
    # A new name survives a power cut only once its folder is synced.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # somebody has removed the file meanwhile, and the folder with it
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Bucket:
    """Storage in a bucket, under a prefix, through obstore."""

    threads = 32

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        self.uri = f"{scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
        self._variables = SCHEMES[scheme]
        try:
            self._store = _object_store(scheme, bucket, prefix or None)
        except Exception as error:  # obstore raises what its settings raise
            raise self._error("", "opened", error) from error

    def get(self, name: str) -> bytes | None:
        """Return the content, or None if there is no such object."""
        import obstore

        try:
            return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError as error:
            raise self._error(name, "read", error) from error

    def put(self, name: str, data: bytes) -> None:
        """Write, or replace whole."""
        import obstore

        try:
            obstore.put(self._store, name, data)
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            raise self._error(name, "written", error) from error

    def create(self, name: str, data: bytes) -> bool:
        """Write unless something is there. True if this call made the object."""
        import obstore

        try:
            obstore.put(self._store, name, data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            # A request that was repeated after a lost answer finds what it made itself.
            return self.get(name) == data
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            raise self._error(name, "written", error) from error
        return True

    def list(self, prefix: str) -> dict[str, Entry]:
        """Return the objects below a folder, sorted by name; empty if there is no such folder."""
        import obstore

        try:
            found = {
                meta["path"]: Entry(meta["size"], meta["e_tag"] or str(meta["last_modified"]))
                for chunk in obstore.list(self._store, prefix, chunk_size=1000)
                for meta in chunk
            }
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            raise self._error(prefix, "read", error) from error
        return dict(sorted(found.items()))

    def beginning(self, folder: str, start: str) -> dict[str, Entry]:
        """Return the objects directly in a folder whose names begin so, sorted by name."""
        import obstore

        stem = f"{folder}/{start}"
        found: dict[str, Entry] = {}
        try:
            # Names come sorted: the first beyond is the last that is asked for.
            for chunk in obstore.list(self._store, folder, offset=stem, chunk_size=1000):
                for meta in chunk:
                    if not meta["path"].startswith(stem):
                        return dict(sorted(found.items()))
                    found[meta["path"]] = Entry(
                        meta["size"], meta["e_tag"] or str(meta["last_modified"])
                    )
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            raise self._error(folder, "read", error) from error
        return dict(sorted(found.items()))

    def holds(self, prefix: str) -> bool:
        """Return whether there is any object below a prefix."""
        import obstore

        try:
            return any(chunk for chunk in obstore.list(self._store, prefix, chunk_size=1))
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            raise self._error(prefix, "read", error) from error

    def stamps(self, prefix: str) -> dict[str, str] | None:
        """Return None: a bucket has no folders."""
        return None

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        import obstore

        if not (left := list(names)):
            return
        try:
            obstore.delete(self._store, left)  # of S3, a thousand a request
            return
        except FileNotFoundError:
            pass  # which of them, and what of those after it, is not told
        except obstore.exceptions.BaseError as error:
            raise self._error(left[0], "removed", error) from error
        for name in left:
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                continue
            except obstore.exceptions.BaseError as error:
                raise self._error(name, "removed", error) from error

    def file(self, name: str, cache: Path) -> Path | None:
        """Return a copy in `cache`, fetched by the first process of this machine that asks."""
        import obstore

        try:
            version = obstore.head(self._store, name)["e_tag"]
            # Another ledger, or another version of this object, is another file.
            key = hashlib.sha256(f"{self.uri}\0{version}".encode()).hexdigest()[:16]
            target = cache / f"{key}-{Path(name).name}"
            cache.mkdir(parents=True, exist_ok=True)
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    staged = target.with_suffix(f".{os.getpid()}")
                    with staged.open("wb") as stream:
                        for chunk in obstore.get(self._store, name):
                            stream.write(chunk)
                    staged.replace(target)
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError as error:
            raise self._error(name, "read", error) from error
        except OSError as error:
            raise LedgerError(
                f"{cache}: cannot hold a copy of {self.where(name)}: {error.strerror}; set "
                "FPT_SWEEP_CACHE to a folder with space"
            ) from error
        return target

    def check_writable(self) -> None:
        """Raise LedgerError if nothing can be written here."""
        probe = f"probe-{secrets.token_hex(8)}"
        self.put(probe, b"")
        self.delete([probe])

    def where(self, name: str) -> str:
        """Return the URI of an object."""
        return f"{self.uri}/{name}" if name else self.uri

    def _error(self, name: str, what: str, error: Exception) -> LedgerError:
        reason = str(error).split("\n", 1)[0]
        return StorageError(
            f"{self.where(name)}: cannot be {what}: {reason}; is the bucket there, and do "
            f"{', '.join(self._variables)} in the environment open it?"
        )


def _object_store(scheme: str, bucket: str, prefix: str | None) -> ObjectStore:
    from obstore.store import AzureStore, GCSStore, S3Store

    # Patient enough for a storage's hiccup, short enough for a person who mistyped an endpoint.
    if scheme == "s3":
        return S3Store(bucket, prefix=prefix, retry_config={"retry_timeout": timedelta(seconds=30)})
    if scheme == "gs":
        return GCSStore(
            bucket, prefix=prefix, retry_config={"retry_timeout": timedelta(seconds=30)}
        )
    return AzureStore(bucket, prefix=prefix, retry_config={"retry_timeout": timedelta(seconds=30)})
