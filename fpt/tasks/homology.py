"""Remote homology: the fold of a protein from its amino acids, as TAPE split SCOP 1.75.

A token is a residue, in TAPE's vocabulary: 0 padding, 1 mask, 2 <cls>, 3 <sep>, 4 unknown, then 5
to 29 the letters of IUPAC in their order (there is no J). <cls> stands before the residues and
<sep> behind them. No superfamily of the test split is in the training split, so that folds have to
be recognised in sequences that hardly resemble those trained on.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fpt import random_streams
from fpt.files import DataError, content_digest
from fpt.hub import HubData
from fpt.spec import JSON, DataPath
from fpt.tasks import pickles
from fpt.tasks.base import (
    Baseline,
    Batch,
    ProtocolName,
    Shape,
    Splits,
    Stored,
    Task,
    epoch_order,
    majority_class,
)

PADDING, CLS, SEP, RESIDUE = 0, 2, 3, 5
"""Token ids; the residues' begin at RESIDUE."""

RESIDUES = b"ABCDEFGHIKLMNOPQRSTUVWXYZ"
"""The letters, in the order of their ids."""

IDS = RESIDUE + len(RESIDUES)

FOLDS, PAPER_CLASSES = 1_195, 1_200
"""Folds that there are, and outputs of the paper's code."""

PAPER_FACTOR = 0.9739
"""What the paper's code multiplies accuracies by, since it drops sequences."""

SPLITS = ("train", "validation", "test")
PUBLISHED = (12_312, 736, 718)
"""Sequences of each split; the test split is the fold holdout."""

Example = tuple[bytes, int]
"""The ids of a protein's residues, and its fold."""

_STRANGE = 255
_TABLE = bytearray([_STRANGE] * 256)
for _id, _letter in enumerate(RESIDUES, start=RESIDUE):
    _TABLE[_letter] = _id

# A repository and the files that are its splits; None: it names its splits itself.
_HUB: dict[str, dict[str, str] | None] = {
    "proteinea/remote_homology": {
        "train": "train.csv",
        "validation": "valid.csv",
        "test": "test_fold_holdout.csv",
    },
    "Hauser7733/TAPE_Remote_Homology": None,
}
_PARQUET = ("README.md", "*.parquet")


class RemoteHomology(Task):
    """Remote homology of TAPE: 1,195 folds, from the Hugging Face Hub or a folder.

    Protocol sound: sequences of more than `tokens` tokens are cut (`too_long` counts them), padding
    is masked, and the last real token, always <sep>, is read out; the validation split picks the
    checkpoint, and the test split is the fold holdout. Protocol paper: batches as in `Bucketed`,
    with four times as many sequences in evaluation; the validation split is the one reported, and
    its accuracy is multiplied by 0.9739, whatever share was really dropped.
    """

    name: Literal["remote-homology"] = "remote-homology"
    tokens: int = Field(default=1024, ge=3)
    """Tokens of a sequence, <cls> and <sep> counted. Longer ones are cut (sound), or dropped with
    the whole of their batch (paper)."""
    folder: DataPath | None = None
    """A folder with the three splits: train, valid and test (or test_fold_holdout), as csv with the
    columns seq and label or primary and fold_label; or TAPE's own remote_homology_train and so on,
    as json or lmdb (which needs the package lmdb). null: the Hub."""
    subset: bool = False
    """true: there may be fewer sequences than TAPE's 12,312, 736 and 718. false: that is taken for
    half a download. It changes no number."""
    repository: Literal["proteinea/remote_homology", "Hauser7733/TAPE_Remote_Homology"] = (
        "proteinea/remote_homology"
    )
    """Where on the Hub; not used with a folder."""
    revision: str = "main"
    """The Hub's revision; not used with a folder."""

    def shape(self, protocol: ProtocolName) -> Shape:
        """1,195 classes; under `paper` 1,200, as many as its code has outputs."""
        classes = PAPER_CLASSES if protocol == "paper" else FOLDS
        return Shape(tokens=self.tokens, inputs=IDS, embedded=True, classes=classes)

    def hub(self) -> HubData | None:
        """The data set, but with a folder."""
        return self.hub_data() if self.folder is None else None

    def hub_data(self) -> HubData:
        """The data set on the Hub, whether it is used or not."""
        named = _HUB[self.repository]
        files = _PARQUET if named is None else tuple(named.values())
        return HubData(self.repository, self.revision, files)

    def splits(self, protocol: ProtocolName) -> Splits:
        """The published splits.

        Raises:
            DataError: If the folder is not whole, or the Hub cannot be reached.
        """
        return _splits(self, protocol, self._digest())

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """The most frequent fold of the training split."""
        splits = self.splits(protocol)
        assert isinstance(splits.train, Stored | Bucketed)
        assert isinstance(splits.test, Stored | Bucketed)
        return majority_class(splits.train.examples.targets, splits.test.examples.targets)

    def too_long(self) -> dict[str, int]:
        """How many sequences of each split have more than `tokens` tokens.

        Raises:
            DataError: As `splits`.
        """
        sets = _sets(self, self._digest())
        return {
            name: sum(len(residues) + 2 > self.tokens for residues, _ in examples)
            for name, examples in zip(SPLITS, sets, strict=True)
        }

    def identity(self) -> JSON:
        """The parameters; a folder by its content, the Hub by repository and revision."""
        out = super().identity()
        del out["subset"]
        if self.folder is not None:
            out |= {"folder": f"sha256:{self._digest()}", "repository": None, "revision": None}
        return out

    def _digest(self) -> str | None:
        if self.folder is None:
            return None
        return content_digest([_content(file) for file in _files(self.folder)])


@dataclass(frozen=True, eq=False)
class Bucketed:
    """The batches of the paper's code: sequences of like lengths, padded to the longest of them.

    An epoch's order is cut into buckets of 100 batches, each bucket is sorted by length and cut
    into batches, and the batches with a sequence that is too long are left out. Step n is the n-th
    batch of what remains. Padding up to the longest counts as real tokens, so that it is not
    masked, and the read-out is at the longest one's end.
    """

    # Paper: a tensor is as long as the longest of the batch. Ours: as long as the task says, all
    # behind the longest masked, because the members of a pack share a tensor; no number sees it.
    # Paper: the last batch of an epoch may be small. Ours: whole ones; what is over is left out.
    # Paper: an epoch has all batches that remain. Ours: as many as are sure to remain, which with
    # TAPE's lengths is a handful fewer of thousands, so that each step can be found by itself.

    examples: Batch
    """`lengths` are those before cutting, so that some are longer than the inputs."""

    BATCHES = 100
    """Batches of a bucket."""
    EVALUATED = 4
    """Evaluation batches are this many times as large."""

    def batch(self, seed: int, stream: int, step: int, size: int) -> Batch:
        """A batch without a sequence that is too long; all of them if there are fewer than `size`.

        Raises:
            DataError: If there may be no such batch.
        """
        if stream == random_streams.EVALUATION:
            size *= self.EVALUATED
        size = min(size, len(self.examples))
        count = self._batches(size)
        epoch, place = divmod(step, count)
        taken = self.examples.take(_epoch(self, seed, stream, epoch, size, count)[place])
        assert taken.lengths is not None
        return Batch(
            taken.inputs.astype(np.int64),
            taken.targets.astype(np.int64),
            np.full(size, taken.lengths.max(), dtype=np.int64),
        )

    def _batches(self, size: int) -> int:
        """Batches that an epoch has for certain."""
        n, tokens = self.examples.inputs.shape
        long = int(np.count_nonzero(self._lengths > tokens))
        batches: int = n // size
        buckets = -(-batches // self.BATCHES)
        # Sorted, a bucket's long ones share batches, all but one of which are full of them.
        dropped = min(long, (long + buckets * (size - 1)) // size)
        if batches == dropped:
            raise DataError(
                f"remote-homology: {long:,} of {n:,} sequences have more than {tokens:,} tokens, "
                f"so that no batch of {size:,} is sure to be without one; raise tokens, lower "
                "batch_size, or take the protocol sound, which cuts them"
            )
        return batches - dropped

    @property
    def _lengths(self) -> np.ndarray:
        assert self.examples.lengths is not None
        return self.examples.lengths


# Kept, as `epoch_order` is, and for the same reason.
@functools.lru_cache(maxsize=64)
def _epoch(
    source: Bucketed, seed: int, stream: int, epoch: int, size: int, count: int
) -> np.ndarray:
    """(count, size) the examples of each batch of an epoch."""
    lengths = source._lengths
    n = len(lengths)
    order = epoch_order(seed, stream, epoch, n)[: n // size * size]
    bucket = np.arange(len(order)) // (source.BATCHES * size)
    batches = order[np.lexsort((lengths[order], bucket))].reshape(-1, size)
    kept = batches[lengths[batches[:, -1]] <= source.examples.inputs.shape[1]]
    # Buckets are alike, so that mixing all batches is as good as mixing each bucket's.
    return random_streams.generator(seed, stream, epoch, site=2).permutation(kept)[:count]


@functools.lru_cache(maxsize=2)
def _sets(task: RemoteHomology, digest: str | None) -> list[list[Example]]:
    # Kept: the trials of a process share the sets. The digest is there to notice a changed folder.
    if task.folder is None:
        where = [f"{task.repository}: {name}" for name in SPLITS]
        sets = _from_hub(task.hub_data())
    else:
        files = _files(task.folder)
        where = [str(file) for file in files]
        sets = [_READERS[file.suffix](file) for file in files]
    for place, examples, published in zip(where, sets, PUBLISHED, strict=True):
        if not examples:
            raise DataError(f"{place}: holds no sequences")
        if len(examples) > published or (len(examples) < published and not task.subset):
            raise DataError(
                f"{place}: holds {len(examples):,} sequences, TAPE's {published:,}; fetch it again"
                + ("" if task.subset else ", or set subset to true if fewer are meant")
            )
    return sets


@functools.lru_cache(maxsize=2)
def _splits(task: RemoteHomology, protocol: ProtocolName, digest: str | None) -> Splits:
    sets = _sets(task, digest)
    sha = hashlib.sha256()
    for examples in sets:
        for residues, fold in examples:
            sha.update(residues + fold.to_bytes(2) + b"\0")
        sha.update(b"\0")
    train, validation, test = (_batch(examples, task.tokens) for examples in sets)
    if protocol == "paper":
        return Splits(
            train=Bucketed(train),
            test=Bucketed(validation),
            digest=sha.hexdigest(),
            factor=PAPER_FACTOR,
        )
    return Splits(
        train=_cut(train), validation=_cut(validation), test=_cut(test), digest=sha.hexdigest()
    )


def _batch(examples: list[Example], width: int) -> Batch:
    """Examples with <cls> and <sep>, cut to `width` tokens; `lengths` are those before."""
    inputs = np.full((len(examples), width), PADDING, dtype=np.uint8)
    for row, (residues, _) in zip(inputs, examples, strict=True):
        text = bytes([CLS, *residues[: width - 2], SEP])
        row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    targets = np.array([[fold] for _, fold in examples], dtype=np.uint16)
    lengths = np.array([len(residues) + 2 for residues, _ in examples], dtype=np.int32)
    return Batch(inputs, targets, lengths)


def _cut(batch: Batch) -> Stored:
    assert batch.lengths is not None
    lengths = np.minimum(batch.lengths, batch.inputs.shape[1])
    return Stored(Batch(batch.inputs, batch.targets, lengths))


def _example(where: str, sequence: Any, fold: Any) -> Example:
    """What a record says, checked.

    Raises:
        DataError: If it is no sequence of residues, or no fold.
    """
    if not isinstance(sequence, str) or not sequence:
        raise DataError(f"{where}: the sequence has to be letters, not {sequence!r}")
    residues = sequence.encode(errors="replace").translate(_TABLE)
    if _STRANGE in residues:
        strange = sequence[residues.index(_STRANGE)]
        raise DataError(
            f"{where}: {strange!r} is no residue; these are {RESIDUES.decode()}, in capitals"
        )
    if type(fold) is not int or not 0 <= fold < FOLDS:
        raise DataError(f"{where}: the fold has to lie between 0 and {FOLDS - 1:,}, not {fold!r}")
    return residues, fold


def _from_hub(data: HubData) -> list[list[Example]]:
    repository = data.repository
    found = data.load(data_files=_HUB[repository])
    sets = []
    for name, spellings in zip(SPLITS, _HUB_SPELLINGS, strict=True):
        split = next((found[spelling] for spelling in spellings if spelling in found), None)
        if split is None:
            raise DataError(
                f"{repository}: has no split {' or '.join(spellings)}, but {', '.join(found)}"
            )
        missing = {"primary", "fold_label"} - set(split.column_names)
        if missing:
            raise DataError(f"{repository}: {name} has no column {' and '.join(sorted(missing))}")
        rows = enumerate(zip(split["primary"], split["fold_label"], strict=True))
        sets.append([_example(f"{repository}: {name}: {n}", *row) for n, row in rows])
    return sets


_HUB_SPELLINGS = (
    ("train",),
    ("validation", "valid"),
    ("test_fold_holdout", "fold_holdout", "test_fold", "fold", "test"),
)


# --- Folders

_LAYOUTS = [
    ["train.csv", "valid.csv", "test_fold_holdout.csv"],
    ["train.csv", "valid.csv", "test.csv"],
    *(
        [f"remote_homology_{split}{suffix}" for split in ("train", "valid", "test_fold_holdout")]
        for suffix in (".json", ".lmdb")
    ),
]


def _files(folder: Path) -> list[Path]:
    """The three splits: files, or folders that hold an lmdb.

    Raises:
        DataError: If they are not there.
    """
    layouts = [[folder / name for name in layout] for layout in _LAYOUTS]
    missing = [[file.name for file in files if not _content(file).is_file()] for files in layouts]
    best, lacking = min(zip(layouts, missing, strict=True), key=lambda pair: len(pair[1]))
    if lacking:
        raise DataError(
            f"{folder}: {' and '.join(lacking)} missing; a folder of remote-homology holds "
            f"{'; or '.join(', '.join(layout) for layout in _LAYOUTS)}"
        )
    return best


def _content(file: Path) -> Path:
    return file / "data.mdb" if file.is_dir() else file


_COLUMNS = (("primary", "fold_label"), ("seq", "label"))


def _csv(file: Path) -> list[Example]:
    """The examples of a csv file with one of the pairs of columns.

    Raises:
        DataError: If it is not one, or a line is cut off.
    """
    # Some copies hold a protein's whole profile in a field; the library's limit is 128 KiB.
    limit = csv.field_size_limit(1 << 30)
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            lines = csv.reader(stream)
            header = next(lines, [])
            columns = [pair for pair in _COLUMNS if set(pair) <= set(header)]
            if not columns:
                raise DataError(
                    f"{file}:1: its columns are {', '.join(header) or 'none'}; there have to be "
                    f"{' or '.join(' and '.join(pair) for pair in _COLUMNS)}"
                )
            sequence, fold = map(header.index, columns[0])
            examples = []
            for line in lines:
                where = f"{file}:{lines.line_num}"
                if len(line) != len(header):
                    raise DataError(
                        f"{where}: {len(line)} fields, not {len(header)}; is it cut off?"
                    )
                number = int(line[fold]) if line[fold].isdecimal() else line[fold]
                examples.append(_example(where, line[sequence], number))
            return examples
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error
    finally:
        csv.field_size_limit(limit)


def _json(file: Path) -> list[Example]:
    """The examples of one of TAPE's json files: a list of objects.

    Raises:
        DataError: If it is not one.
    """
    try:
        records = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: not a file of TAPE: it has to be a list of objects")
    return [_record(f"{file}: record {n}", record) for n, record in enumerate(records)]


def _record(where: str, record: Any) -> Example:
    keys = _COLUMNS[0]
    if not isinstance(record, dict) or not set(keys) <= set(record):
        raise DataError(f"{where}: not an object with {' and '.join(keys)}")
    return _example(where, *(record[key] for key in keys))


def _lmdb(file: Path) -> list[Example]:
    """The examples of one of TAPE's lmdb folders (or of such a file by itself).

    Raises:
        DataError: If it is not one, or the package lmdb is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise DataError(
            f"{file}: to read it takes the package lmdb, which is not installed; `pip install "
            "lmdb`, or give a folder with the json or csv files"
        ) from error
    try:
        with (
            lmdb.open(str(file), subdir=file.is_dir(), readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            # Reading beyond the end of a mapped file would end the process.
            promised = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            size = _content(file).stat().st_size
            if size < promised:
                raise DataError(
                    f"{file}: its header promises {promised:,} bytes, it has {size:,}; fetch it "
                    "again"
                )

            def value(key: str) -> Any:
                pickled = transaction.get(key.encode())
                if pickled is None:
                    raise DataError(f"{file}: record {key} missing; fetch it again")
                try:
                    return pickles.loads(pickled)
                except ValueError as error:
                    raise DataError(f"{file}: record {key}: {error}; fetch it again") from error

            count = value("num_examples")
            if type(count) is not int:
                raise DataError(f"{file}: num_examples has to be a number, not {count!r}")
            return [_record(f"{file}: record {n}", value(str(n))) for n in range(count)]
    except lmdb.Error as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error


_READERS: dict[str, Callable[[Path], list[Example]]] = {
    ".csv": _csv,
    ".json": _json,
    ".lmdb": _lmdb,
}
