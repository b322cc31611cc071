"""A bundle: a sweep and what the ledger holds of it, in one zip that anybody can check and read.

    README.md               how to read the rest
    NAME.yaml, NAME.lock    the sweep file, its lock, and modules of its own that it names
    results/                a ledger of the sweep's trials: `sweep table` works on it
    tables/                 the table in every format, and the claims with their verdicts
    report.html             all of it on one page
    trials.json             the trials as the sweep file expands to them
    manifest.json           the SHA-256 and the size of each of these

The same ledger gives the same bytes, however its rows lie: members are in the order of their names,
the manifest last, and without the time of day. Rows are in segments (see `sweep.ledger.segments`),
but for what is not settled: that lies there as it does in the ledger. A bundle of somebody else's
is read with suspicion: nothing but what its manifest lists is unpacked, under no other name than a
ledger's.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fpt import plugins
from fpt.spec import JSON
from sweep.analysis import tables
from sweep.exchange.publication import is_publication, restore
from sweep.ledger.errors import unwritable
from sweep.ledger.ledger import Kept, Ledger, LedgerError, is_object
from sweep.planning.plan import plan
from sweep.planning.tuning import resolve
from sweep.sweepfile import lock
from sweep.sweepfile.trials import Sweep

MANIFEST = "manifest.json"
FORMAT = 2
"""Raised when a bundle gets another form."""
READ = (1, 2)
"""Forms that are read: in the first, each row was a file."""
RESULTS = "results/"
"""Where the ledger's objects lie in a bundle."""

MOST_MANIFEST, MOST_ROWS = 256 << 20, 256 << 20
"""Bytes of a manifest, and of a Parquet file, beyond which a bundle is not believed."""
MOST_RATIO, SLACK = 20, 64 << 20
"""How much larger than itself a bundle may unpack to: times, and then bytes. Its content hardly
shrinks, so that what is beyond is made to fill a disk."""

CHUNK = 1 << 20

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,  # of names that are no UTF-8, too
)
# What zipfile raises at bytes that it cannot make sense of.


class BundleError(LedgerError):
    """A bundle that cannot be written or is not to be trusted; the message is for people."""


@dataclass(frozen=True)
class Bundle:
    """What was put into a bundle."""

    path: Path
    trials: int
    """Trials of the sweep that have a row in it."""
    expected: int
    """Trials of the sweep."""
    members: int
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""


# ------------------------------------------------------------------------------------------ writing


def export(sweep: Sweep, ledger: Ledger, output: Path, *, states: bool = False) -> Bundle:
    """Write a bundle of a sweep, with what there is so far; a file of that name is replaced.

    Args:
        sweep: The sweep.
        ledger: Where its rows are.
        output: The file; its name ends in .zip.
        states: Also what trials resume from, trained tensors and backbones: large.

    Raises:
        BundleError: If the file cannot be written.
        LedgerError: If the ledger cannot be read, or holds damaged files of these trials.
    """
    if output.suffix != ".zip":
        raise BundleError(f"{output}: a bundle is a zip; give it a name that ends in .zip")
    still = ledger.snapshot()  # a run may be under way: all that is said is of the same rows
    sweep = resolve(sweep, still)
    members = _members(sweep, still)
    rows, done = _rows(sweep, still, states=states)
    # Last: to show claims is to write down what was read.
    rows |= {name: partial(ledger.copy, name) for name in ledger.notes.names(sweep.name)}
    manifest: JSON = {
        "format": FORMAT,
        "sweep": sweep.name,
        "file": sweep.file.name,
        "written_by": f"fpt-sweep {_version()}",
        "trials": done,
        "expected": len(sweep.all),
        "members": {},
    }
    members |= {RESULTS + name: read for name, read in rows.items()}
    try:
        handle, staged = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}-")
        try:
            with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w") as archive:
                for name, read in sorted(members.items()):
                    data = read()
                    digest = hashlib.sha256(data).hexdigest()
                    manifest["members"][name] = {"sha256": digest, "size": len(data)}
                    _add(archive, name, data)
                _add(archive, MANIFEST, _text(manifest))
            os.chmod(staged, 0o644)
            with open(staged, "rb") as whole:
                digest = hashlib.file_digest(whole, "sha256").hexdigest()
            os.replace(staged, output)
        finally:
            Path(staged).unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(unwritable(output, error)) from error
    return Bundle(
        path=output,
        trials=manifest["trials"],
        expected=len(sweep.all),
        members=len(members) + 1,
        size=output.stat().st_size,
        sha256=digest,
    )


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    # Stored: libraries compress alike in meaning, not to the byte, and Parquet hardly shrinks.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    archive.writestr(info, data)


Member = Callable[[], bytes]


def _rows(sweep: Sweep, ledger: Ledger, *, states: bool) -> tuple[dict[str, Member], int]:
    """Return the objects of a ledger of the sweep's trials, by name, and how many of them are done.

    Args:
        sweep: The sweep.
        ledger: Where its rows are.
        states: Also what trials resume from, trained tensors and backbones.

    Raises:
        LedgerError: If files of these trials are damaged.
    """
    ids = {point.trial_id for point in sweep.all}
    settled, objects = ledger.settled_objects(ids)
    members: dict[str, Member] = {name: partial(bytes, data) for name, data in objects.items()}
    # Curves of trials that have yet to end may go on, and come as they are; so does all else.
    kinds: tuple[Kept, ...] = ("curves", "states", "backbones") if states else ("curves",)
    for kind in kinds:
        own = ledger.names(kind)
        chosen = own.keys() & (ids - settled if kind == "curves" else ids)
        members |= {name: partial(ledger.copy, name) for trial in chosen for name in own[trial]}
    return members, len(ledger.done() & ids)


def _members(sweep: Sweep, ledger: Ledger) -> dict[str, Member]:
    """Return all but the ledger: member -> what gives its content."""
    status = plan(sweep, ledger).status
    texts = {
        "README.md": _readme(sweep, status),
        "trials.json": _text(
            [
                {
                    "trial_id": point.trial_id,
                    "cell_id": point.cell_id,
                    "label": point.label,
                    "labels": dict(point.labels),
                    "status": status[point.trial_id],
                    "config": point.identity,
                }
                for point in sweep.all
            ]
        ),
    }
    if sweep.table is not None:
        table = tables.build(sweep, ledger)
        texts |= {
            "tables/table.md": table.to_markdown().encode(),
            "tables/table.csv": table.to_csv().encode(),
            "tables/table.tex": table.to_latex().encode(),
            "tables/table.html": table.to_html().encode(),
        }
    if sweep.spec.claims:
        from sweep.analysis.claims import show

        judged = show(sweep, ledger)
        texts["tables/claims.md"] = judged.to_markdown().encode()
        texts["tables/claims.json"] = _text(judged.record())
    from sweep.analysis import report

    # With the file's name alone, as whoever unpacks it has it.
    page = report.render(replace(sweep, file=Path(sweep.file.name)), ledger)
    texts["report.html"] = page.encode()
    for file in _sources(sweep):
        texts[file.relative_to(sweep.file.parent).as_posix()] = file.read_bytes()
    return {name: partial(bytes, data) for name, data in texts.items()}


def _sources(sweep: Sweep) -> Iterator[Path]:
    # The sweep file, its lock, and the modules beside it that the user's own classes take.
    folder, here = sweep.file.parent, sweep.file.resolve().parent
    yield sweep.file
    if (locked := lock.lock_file(sweep.file)).is_file():
        yield locked
    names = (name for p in sweep.all for name in (p.config.task.name, p.config.backbone.name))
    modules = {name.partition(":")[0] for name in names if ":" in name}
    # By name, since this process may have imported them from a copy of the same content.
    files = {file for module in modules for file in plugins.sources(module)}
    yield from sorted(folder / file for file in files if (here / file).is_file())


def _readme(sweep: Sweep, status: Mapping[str, str]) -> bytes:
    counts = Counter(status.values())
    said = ", ".join(f"{number} {name}" for name, number in counts.items())
    shown = (
        "`tables/` has the table as Markdown, CSV, LaTeX and HTML. To make it again:\n\n"
        f"    sweep table {sweep.file.name}\n"
        if sweep.table is not None
        else ""
    )
    return f"""\
# {sweep.name}

{sweep.spec.description.strip() or "A sweep of fpt-sweep."}

{len(sweep.all)} trials: {said}. `report.html` shows them on one page, for any browser. Unpack
this file into a folder of its own, and work there.

{shown}
`results/` is a ledger. A row for each trial that has ended, with its config, outcome, cost and
origin, and its curve:

    python -c "import pandas; print(pandas.read_parquet('results/trials'))"
    sweep show {sweep.all[0].trial_id if sweep.all else "TRIAL"}

`trials.json` lists the trials that `{sweep.file.name}` expands to. Where these read a data set or
weights of this machine's disk, the same content has to lie at the same path for `sweep` to expand
the file; its digest is part of each trial's id.

To train what is missing, or all of it anew in a ledger of your own, and to compare:

    sweep run {sweep.file.name}
    sweep run {sweep.file.name} --results again
    sweep diff results again {sweep.file.name}

To unite it with a ledger of yours: `sweep merge BUNDLE.zip --into RESULTS`. `{MANIFEST}` has the
SHA-256 of every file; merge checks them. Modules beside `{sweep.file.name}`, if there are any, are
code that `sweep` imports: read them first.
""".encode()


def _version() -> str:
    import sweep

    return str(sweep.__version__)


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------ reading


@contextmanager
def opened(source: str | Path) -> Iterator[Ledger]:
    """The ledger at a path or URI, in a bundle or of a publication, while the block lasts.

    Raises:
        BundleError: If a bundle is damaged, or made to do harm.
        LedgerError: If there is no ledger, or a publication is damaged.
    """
    path = Path(source)
    if is_publication(path):
        with tempfile.TemporaryDirectory(prefix="fpt-sweep-published-") as folder:
            ledger = Ledger(folder, write=True)
            restore(path, ledger)
            yield ledger
        return
    if not path.is_file():
        ledger = Ledger.existing(source)
        yield ledger
        return
    with tempfile.TemporaryDirectory(prefix="fpt-sweep-bundle-") as folder:
        unpack(path, Path(folder))
        try:
            yield Ledger(Path(folder) / RESULTS)
        except LedgerError as error:
            # People know the bundle, and not where it was unpacked to.
            raise type(error)(str(error).replace(f"{folder}/", f"{path}: ")) from error


def unpack(path: Path, folder: Path) -> None:
    """Unpack the ledger of a bundle, each object checked against the manifest.

    Args:
        path: The bundle.
        folder: An empty folder; `results/` comes to lie in it.

    Raises:
        BundleError: If it is no bundle, is damaged, or is made to do harm. What was unpacked until
            then stays for the caller to remove.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = _checked(path, archive)
            manifest = _manifest(path, archive, infos)
            size = sum(info.file_size for info in infos.values())
            if size > (free := shutil.disk_usage(folder).free):
                raise BundleError(
                    f"{path}: unpacks to {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB "
                    "left; set TMPDIR to a folder with space"
                )
            for name, wanted in manifest.items():
                digest = _unpack(archive, infos[name], folder)
                if digest != wanted:
                    raise BundleError(
                        f"{path}: {name}: is not what {MANIFEST} says (SHA-256 {digest[:12]}..., "
                        f"not {wanted[:12]}...); get the bundle once more"
                    )
    except _DAMAGE as error:
        raise BundleError(f"{path}: no bundle, or damaged ({error}); get it once more") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be unpacked ({error.strerror or error})") from error


def _checked(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    # Members by name. Whoever has one of these faults in a bundle did not get it from us.
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # zipfile itself mends some names; what stands in the file is judged.
        name = info.orig_filename
        pure = PurePosixPath(name)
        if (
            pure.is_absolute()
            or ".." in pure.parts
            or any(character in name for character in "\\:\0")
            or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR)
        ):
            raise BundleError(f"{path}: {name!r} would not stay in its folder: not to be trusted")
        if name in infos:
            raise BundleError(f"{path}: {name} is in it twice: not to be trusted")
        if not info.is_dir():
            infos[name] = info
    whole = sum(info.file_size for info in infos.values())
    if whole > MOST_RATIO * path.stat().st_size + SLACK:
        raise BundleError(
            f"{path}: unpacks to {whole / 1e9:,.1f} GB, {whole / path.stat().st_size:,.0f} times "
            "its size, which no ledger does: not to be trusted"
        )
    return infos


def _manifest(
    path: Path, archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo]
) -> dict[str, str]:
    # The digests of the objects of the ledger. All that the manifest lists is there, and is all.
    if MANIFEST not in infos or infos[MANIFEST].file_size > MOST_MANIFEST:
        raise BundleError(f"{path}: no bundle: `sweep export` writes one, with a {MANIFEST}")
    try:
        manifest = json.loads(archive.read(infos[MANIFEST]))
        form, members = manifest["format"], manifest["members"]
        entries = {name: str(one["sha256"]) for name, one in members.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: {MANIFEST} is damaged ({error}); get it once more") from error
    if form not in READ:
        raise BundleError(
            f"{path}: a bundle of format {form!r}, and this reads up to {FORMAT}; upgrade it"
        )
    if different := sorted((infos.keys() - {MANIFEST}) ^ entries.keys()):
        what = "is not listed in" if different[0] in infos else "is missing, and is listed in"
        raise BundleError(f"{path}: {different[0]}: {what} {MANIFEST}; get the bundle once more")
    objects = {name: digest for name, digest in entries.items() if name.startswith(RESULTS)}
    for name in objects:
        large = name.endswith(".parquet") and infos[name].file_size > MOST_ROWS
        if large or not is_object(name.removeprefix(RESULTS)):
            raise BundleError(f"{path}: {name}: no object of a ledger: not to be trusted")
    return objects


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path) -> str:
    target = folder / info.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    # Reads no more than the size that was checked.
    with archive.open(info) as stream, target.open("xb") as out:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()
