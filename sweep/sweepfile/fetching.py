"""What a sweep reads, brought to this machine ahead of a run: models and data sets of the Hub into
its cache, whole and checked; folders and packages looked at where they lie.

Each source is fetched for itself: what is wrong with one is told, and the others go on. A file is
checked against the SHA-256 in the lock, else against what the Hub says of it; one that differs is
removed and downloaded once more. Files that are whole are never downloaded twice, so that after a
kill the same command goes on with the file that was under way.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fpt import hub
from fpt.backbones.sources import (
    FORMATS,
    HUB,
    check_config,
    hub_files,
    shards,
    weight_files,
    weights_identity,
)
from fpt.config import BackboneConfig, TrialConfig
from fpt.files import DataError
from sweep.sweepfile import lock as locks
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.expansion import load
from sweep.sweepfile.lock import Entry, Lock, LockedFile, LockError, Source, sources
from sweep.sweepfile.trials import Sweep

CONFIG, INDEX = "config.json", ".index.json"
THE_LOCK = "the lock"
TIMEOUT = 30.0
"""Seconds that the Hub has to list a repository."""
CHUNK = 1 << 20
"""Bytes that are hashed between two looks at the progress bar."""


@dataclass
class Summary:
    """What came of a fetch."""

    good: int = 0
    """Sources that are here, whole and checked."""
    bad: int = 0
    """Sources that are not, and sweep files that are wrong."""
    size: int = 0
    """Bytes of what comes from the Hub."""
    downloaded: int = 0
    """Bytes that were not here before."""

    @property
    def exit_code(self) -> int:
        """0: everything is here. 1: a part of it is. 2: nothing is."""
        return (1 if self.good else 2) if self.bad else 0


def fetch(
    files: Sequence[Path], *, update: bool = False, console: Console, quiet: bool = False
) -> Summary:
    """Bring here what the trials of sweep files read, and write their locks.

    Args:
        files: Sweep files.
        update: Ask anew which commits branches and tags stand for, whatever the locks say.
        console: Where progress, results and problems go.
        quiet: Whether only problems are printed.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with progress:
        fetcher = _Fetcher(progress, quiet=quiet)
        for file in files:
            try:
                # As it is written: the lock may be what is wrong.
                sweep = load(file, locked=False)
                lock = _lock_of(file, update=update)
            except (SweepFileError, LockError) as error:
                fetcher.problem(str(error))
                continue
            fetcher.sweep(sweep, lock, update=update)
    return fetcher.summary


def _lock_of(file: Path, *, update: bool) -> Lock:
    try:
        return locks.read(file)
    except LockError:
        if update:
            return Lock()
        raise


@dataclass(frozen=True)
class _Expected:
    # What a file has to be, as far as it is known: in the lock, by the Hub, by its name in the
    # cache (which is that of its content).
    size: int | None = None
    sha256: str | None = None
    git: str | None = None
    """SHA-1 of a file that is small enough for git itself."""

    def differs(self, found: LockedFile, git: str) -> str:
        # How a file is another one; empty if it is not known to be.
        if self.sha256 not in (None, found.sha256):
            return f"its SHA-256 is {found.sha256}, and should be {self.sha256}"
        if self.size not in (None, found.size):
            return f"it has {found.size:,} bytes, and should have {self.size:,}"
        if self.git not in (None, git):
            return f"its git hash is {git}, and should be {self.git}"
        return ""


@dataclass(frozen=True)
class _Listing:
    revision: str
    files: dict[str, _Expected]
    says: str
    """Who says so."""


@dataclass
class _Fetcher:
    progress: Progress
    quiet: bool
    summary: Summary = field(default_factory=Summary)
    listings: dict[Source, _Listing] = field(default_factory=dict)
    """What the Hub said, of sources that several sweep files share."""
    hashes: dict[Path, tuple[LockedFile, str]] = field(default_factory=dict)
    """Likewise, what was hashed."""
    told: set[str] = field(default_factory=set)
    """The local sources that were looked at."""

    def note(self, text: str) -> None:
        if not self.quiet:
            self.say(text)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def problem(self, text: str) -> None:
        self.summary.bad += 1
        self.say(text)

    def sweep(self, sweep: Sweep, lock: Lock, *, update: bool) -> None:
        wanted: dict[Source, _Wanted] = {}
        for point in sweep.all:
            self.local(point.config)
            for source, files in sources(point.config).items():
                wanted.setdefault(source, _Wanted()).add(files, point.config)
        entries: dict[str, dict[str, Entry]] = {"model": {}, "dataset": {}}
        for source, what in wanted.items():
            entry = before = lock.entry(source)
            # What cannot be fetched now is still what the trials are about: its entry stays.
            with self.apart():
                entry = self.source(source, tuple(what.files), before, update=update)
                self.usable(source, entry, what)
            if entry is not None:
                entries[source.kind][source.key] = entry
        self.write(sweep.file, Lock(models=entries["model"], datasets=entries["dataset"]))

    def write(self, file: Path, lock: Lock) -> None:
        path = locks.lock_file(file)
        if not (lock.models or lock.datasets or path.is_file()):
            return
        try:
            changed = locks.write(file, lock)
        except OSError as error:
            self.problem(f"{path}: cannot be written ({error.strerror})")
        else:
            self.note(f"{path}: {'written' if changed else 'as it was'}")

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """A problem of one source is its own."""
        try:
            yield
        except DataError as error:
            self.problem(str(error))
        else:
            self.summary.good += 1

    # What lies here already.

    def local(self, config: TrialConfig) -> None:
        weights = config.backbone.weights
        if config.reads_weights and weights is not None and not weights.startswith(HUB):
            own = config.backbone.row.version is not None
            self.once(weights, functools.partial(self.weights, weights, own=own))
        for name in type(config.task).model_fields:
            if isinstance(path := getattr(config.task, name), Path):
                self.once(str(path), functools.partial(self.digest, config, name))

    def once(self, name: str, look: Callable[[], str]) -> None:
        if name not in self.told:
            self.told.add(name)
            with self.apart():
                self.note(f"{name}: {look()}")

    def digest(self, config: TrialConfig, field: str) -> str:
        return str(config.task.identity()[field])

    def weights(self, weights: str, *, own: bool) -> str:
        weights_file(weights, own=own)
        return weights_identity(weights, own=own)

    # What the Hub has.

    def source(
        self, source: Source, wanted: tuple[str, ...], before: Entry | None, *, update: bool
    ) -> Entry:
        listing = self.listing(source, wanted, before, update=update)
        downloaded = self.summary.downloaded
        files = {}
        names = _chosen(source, wanted, listing.files)
        for name in names:
            files[name] = self.file(source, listing, name)
            if name.endswith(INDEX):  # The rest is known once it is here; the loop goes on with it.
                names += shards(self.path(source, listing.revision, name))
        size = sum(one.size for one in files.values())
        self.summary.size += size
        new = self.summary.downloaded - downloaded
        count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
        self.note(
            f"{source}: commit {listing.revision}, {count}, {megabytes(size)} "
            f"({megabytes(new)} downloaded), checked against {listing.says}"
        )
        return Entry(revision=listing.revision, files=files)

    def listing(
        self, source: Source, wanted: tuple[str, ...], before: Entry | None, *, update: bool
    ) -> _Listing:
        asked = source
        if before is not None and not update:
            locked = {name: _Expected(one.size, one.sha256) for name, one in before.files.items()}
            if not _lacking(source, wanted, locked):
                return _Listing(before.revision, locked, THE_LOCK)
            asked = Source(source.kind, source.repository, before.revision)
        try:
            found = self.listings[asked] = self.listings.get(asked) or _ask(asked)
        except DataError:
            # To ask anew is to ask the Hub.
            here = None if update and not asked.pinned else _cached(asked)
            if here is None or _lacking(source, wanted, here.files):
                raise
            return here
        if lacking := _lacking(source, wanted, found.files):
            raise DataError(f"{source}: has no {', '.join(lacking)} at commit {found.revision}")
        return found

    def path(self, source: Source, revision: str, name: str) -> Path:
        """Return a file in the cache, downloaded if it is not there."""
        from huggingface_hub import hf_hub_download

        folder = hub.snapshot(source.repository, kind=source.kind, revision=revision)
        if folder is not None and (folder / name).is_file():
            return folder / name
        with (
            self.task(f"{source.repository}/{name}") as advance,
            hub.told(f"{source}: {name}", revision),
        ):
            file = hf_hub_download(
                source.repository,
                name,
                repo_type=source.kind,
                revision=revision,
                tqdm_class=_bar(advance),
            )
        self.summary.downloaded += Path(file).stat().st_size
        return Path(file)

    def file(self, source: Source, listing: _Listing, name: str) -> LockedFile:
        # A file that is not on the list is a shard: the Hub will say if there is none.
        expected = listing.files.get(name, _Expected())
        problem = ""
        for _ in range(2):
            try:
                path = self.path(source, listing.revision, name)
            except DataError as error:
                raise DataError(f"{problem}{error}") from error
            found, git = self.hashed(path)
            wrong = expected.differs(found, git)
            if not wrong:
                return found
            problem = f"{source}: {name}: {wrong}, by {listing.says}; "
            blob = path.resolve()
            if blob.name in (found.sha256, git):  # It is what the Hub has.
                break
            del self.hashes[path]
            path.unlink()
            blob.unlink(missing_ok=True)
        mend = (
            "`sweep fetch --update` makes the lock anew"
            if listing.says == THE_LOCK
            else ("it was removed; try again later")
        )
        raise DataError(problem + mend)

    def hashed(self, path: Path) -> tuple[LockedFile, str]:
        """Return what a lock says of a file, and git's name for its content."""
        if path not in self.hashes:
            size = path.stat().st_size
            sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
            with self.task(f"checking {path.name}", size) as advance, path.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    sha256.update(chunk)
                    git.update(chunk)
                    advance(len(chunk))
            self.hashes[path] = LockedFile(size=size, sha256=sha256.hexdigest()), git.hexdigest()
        return self.hashes[path]

    @contextlib.contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A line of the progress display: (bytes, of how many) -> None moves it."""
        task = self.progress.add_task(name, total=total)

        def advance(size: float, total: float | None = None) -> None:
            self.progress.update(task, advance=size, total=total)

        try:
            yield advance
        finally:
            self.progress.remove_task(task)

    def usable(self, source: Source, entry: Entry, what: _Wanted) -> None:
        """Look whether a model is the one that the trials say, in a form that can be mapped."""
        if source.kind != "model":
            return
        if CONFIG in entry.files:
            file = self.path(source, entry.revision, CONFIG)
            for one in what.backbones:
                try:
                    check_config(file, str(source), one.name, **one.sizes)
                except ValueError as error:
                    raise DataError(str(error)) from error
        weights_file(f"{HUB}{source.repository}@{entry.revision}")


@dataclass
class _Wanted:
    # What trials want of a source.
    files: dict[str, None] = field(default_factory=dict)
    backbones: set[BackboneConfig] = field(default_factory=set)

    def add(self, files: Iterable[str], config: TrialConfig) -> None:
        self.files |= dict.fromkeys(files)
        self.backbones.add(config.backbone)


def weights_file(weights: str, *, own: bool = False) -> Path:
    """As `fpt.backbones.weights.weights_file`, without torch where nothing has to be converted."""
    here = () if weights.startswith(HUB) else weight_files(weights, own=own)
    files = [one for one in here if one.name != "config.json"] or hub_files(weights)
    if files[0].name == FORMATS[0]:
        return files[0]
    from fpt.backbones.conversion import one_safetensors

    return one_safetensors(files)


def _ask(source: Source) -> _Listing:
    from huggingface_hub import HfApi

    api = HfApi()
    ask = api.model_info if source.kind == "model" else api.dataset_info
    with hub.told(str(source), source.revision):
        info = ask(
            source.repository, revision=source.revision, files_metadata=True, timeout=TIMEOUT
        )
    files = {
        one.rfilename: _Expected(
            one.size, one.lfs.sha256 if one.lfs else None, None if one.lfs else one.blob_id
        )
        for one in info.siblings or ()
    }
    if info.sha is None:
        raise DataError(f"{source}: the Hub names no commit of it")
    return _Listing(info.sha, files, "the Hub")


def _cached(source: Source) -> _Listing | None:
    """Return what the cache has of a source. Its files lie under the digests that the Hub gave
    them.
    """
    folder = hub.snapshot(source.repository, kind=source.kind, revision=source.revision)
    if folder is None:
        return None
    names = {name: (folder / name).resolve().name for name in hub.names_in(folder)}
    files = {
        name: _Expected(
            sha256=blob if re.fullmatch("[0-9a-f]{64}", blob) else None,
            git=blob if re.fullmatch("[0-9a-f]{40}", blob) else None,
        )
        for name, blob in names.items()
    }
    return _Listing(folder.name, files, "the cache, since the Hub was not reached")


def _chosen(source: Source, wanted: tuple[str, ...], names: Iterable[str]) -> list[str]:
    names = set(names)
    if source.kind == "dataset":
        return hub.HubData(source.repository, source.revision, wanted).among(names)
    best = [name for name in wanted if name in names][:1]
    return [*({CONFIG} & names), *best]


def _lacking(source: Source, wanted: tuple[str, ...], names: Iterable[str]) -> list[str]:
    if source.kind == "dataset":
        return hub.HubData(source.repository, source.revision, wanted).lacking(names)
    return [] if set(wanted) & set(names) else [" nor ".join(wanted)]


def _bar(advance: Callable[..., None]) -> type[Any]:
    """Return what huggingface_hub reports progress to: a bar of tqdm's that shows nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]
            advance(options.get("initial", 0), options.get("total"))

        def update(self, n: float | None = 1) -> None:
            advance(n or 0)

        # hf_xet counts twice, what came and what was written: the latter is shown.

        def update_transfer(self, n: float) -> None:
            pass

        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
            pass

    return Bar


def megabytes(size: float) -> str:
    """Return a number of bytes, for people."""
    return f"{size / 1e6:,.1f} MB"
