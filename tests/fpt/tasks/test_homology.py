"""Remote homology: the vocabulary, the paper's batches, and folders that are not what they seem."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpt import TrialConfig, build_model, random_streams
from fpt.files import DataError
from fpt.hub import HubData
from fpt.tasks import homology
from fpt.tasks.base import Batch, Stored
from fpt.tasks.homology import FOLDS, Bucketed, RemoteHomology

Write = Callable[..., Path]
Split = list[tuple[str, int]]

NAMES = ("train", "valid", "test_fold_holdout")

# TAPE's vocabulary, as its tokenizer lists it.
VOCABULARY = {
    name: number
    for number, name in enumerate(
        ["<pad>", "<mask>", "<cls>", "<sep>", "<unk>", *"ABCDEFGHIKLMNOPQRSTUVWXYZ"]
    )
}

SPLITS: list[Split] = [
    [("ACDE", 7), ("WWW", 1194), ("MKV", 7)],
    [("HHHHHH", 0)],
    [("YX", 3), ("GG", 7)],
]


@pytest.fixture(autouse=True)
def _forget() -> None:
    homology._sets.cache_clear()
    homology._splits.cache_clear()


def task(folder: Path, **parameters: Any) -> RemoteHomology:
    return RemoteHomology(folder=folder, subset=True, **{"tokens": 24, **parameters})


def records(split: Split) -> list[dict[str, Any]]:
    """What TAPE keeps of its proteins."""
    return [
        {
            "primary": sequence,
            "protein_length": len(sequence),
            "evolutionary": np.full((len(sequence), 30), 0.5).tolist(),
            "fold_label": fold,
            "id": f"d{n}",
        }
        for n, (sequence, fold) in enumerate(split)
    ]


def write_csv(folder: Path) -> None:
    for name, split in zip(("train", "valid", "test"), SPLITS, strict=True):
        lines = ["seq,label", *(f"{sequence},{fold}" for sequence, fold in split)]
        (folder / f"{name}.csv").write_text("\n".join([*lines, ""]))


def write_hub_csv(folder: Path) -> None:
    for name, split in zip(NAMES, SPLITS, strict=True):
        lines = ["index,primary,profile,fold_label"]
        # A field that is longer than Python's csv module reads unless told to.
        profile = "0.25, " * 50_000
        lines += [f'{n},{sequence},"{profile}",{fold}' for n, (sequence, fold) in enumerate(split)]
        (folder / f"{name}.csv").write_text("\r\n".join([*lines, ""]))


def write_json(folder: Path) -> None:
    for name, split in zip(NAMES, SPLITS, strict=True):
        (folder / f"remote_homology_{name}.json").write_text(json.dumps(records(split)))


def write_lmdb(folder: Path, *, subdir: bool = True, protocol: int = 4) -> None:
    for name, split in zip(NAMES, SPLITS, strict=True):
        path = folder / f"remote_homology_{name}.lmdb"
        with (
            lmdb.open(str(path), map_size=1 << 24, subdir=subdir, lock=subdir) as environment,
            environment.begin(write=True) as transaction,
        ):
            transaction.put(b"num_examples", pickle.dumps(len(split), protocol))
            for n, record in enumerate(records(split)):
                record["evolutionary"] = np.array(record["evolutionary"], np.float32)
                record["fold_label"] = np.int64(record["fold_label"])
                record["id"] = record["id"].encode()
                transaction.put(str(n).encode(), pickle.dumps(record, protocol))


WRITERS: dict[str, Callable[[Path], None]] = {
    "csv": write_csv,
    "csv of the Hub": write_hub_csv,
    "json": write_json,
    "lmdb": write_lmdb,
    "lmdb as files": lambda folder: write_lmdb(folder, subdir=False),
    "lmdb of long ago": lambda folder: write_lmdb(folder, protocol=2),
}


def stored(source: Any) -> Stored:
    assert isinstance(source, Stored)
    return source


def as_text(batch: Batch) -> list[str]:
    """The tokens of each sequence, padding cut off."""
    letters = {number: name for name, number in VOCABULARY.items()}
    return ["".join(letters[token] for token in row if token) for row in batch.inputs.tolist()]


# --- Protocol sound


def test_residues_have_the_ids_of_tapes_vocabulary() -> None:
    for letter in (name for name in VOCABULARY if len(name) == 1):
        residues, fold = homology._example("here", letter * 2, 5)
        assert list(residues) == [VOCABULARY[letter]] * 2
        assert fold == 5
    assert max(VOCABULARY.values()) + 1 == homology.IDS == 30
    assert [VOCABULARY[name] for name in ("<pad>", "<cls>", "<sep>")] == [
        homology.PADDING,
        homology.CLS,
        homology.SEP,
    ]


def test_long_sequences_are_cut_counted_and_end_in_sep(tmp_path: Path) -> None:
    write_csv(tmp_path)
    small = task(tmp_path, tokens=5)
    test, train = stored(small.splits("sound").test), stored(small.splits("sound").train)
    whole = stored(task(tmp_path).splits("sound").train)

    assert small.too_long() == {"train": 1, "validation": 1, "test": 0}
    assert as_text(train.examples) == ["<cls>ACD<sep>", "<cls>WWW<sep>", "<cls>MKV<sep>"]
    assert as_text(whole.examples)[0] == "<cls>ACDE<sep>"
    for split in (train, test, whole):
        assert split.examples.lengths is not None
        last = np.take_along_axis(split.examples.inputs, split.examples.lengths[:, None] - 1, 1)
        assert set(last.ravel().tolist()) == {homology.SEP}
        assert np.array_equal((split.examples.inputs > 0).sum(1), split.examples.lengths)


def test_the_factor_is_the_papers_alone(tmp_path: Path) -> None:
    write_csv(tmp_path)

    assert task(tmp_path).splits("paper").factor == 0.9739
    assert task(tmp_path).splits("sound").factor == 1


def test_the_baseline_is_the_most_frequent_fold(tmp_path: Path) -> None:
    write_csv(tmp_path)

    # Fold 7: of the test split the half, of the validation split, which `paper` reports, none.
    assert task(tmp_path).baseline("sound").accuracy == 0.5
    assert task(tmp_path).baseline("paper").accuracy == 0


# --- Protocol paper: its batches


def bucketed(lengths: list[int], tokens: int) -> Bucketed:
    """Sequences that are told apart by their targets."""
    inputs = np.zeros((len(lengths), tokens), np.uint8)
    for row, length in zip(inputs, lengths, strict=True):
        row[:length] = 9
    return Bucketed(Batch(inputs, np.arange(len(lengths))[:, None], np.array(lengths)))


def walk(source: Bucketed, order: list[int], size: int) -> Iterator[list[int]]:
    """An epoch's batches as the paper's code makes them: a bucket at a time, long ones skipped."""
    lengths = source.examples.lengths
    assert lengths is not None
    for start in range(0, len(order), 100 * size):
        bucket = sorted(order[start : start + 100 * size], key=lambda n: int(lengths[n]))
        for first in range(0, len(bucket), size):
            batch = bucket[first : first + size]
            if max(int(lengths[n]) for n in batch) <= source.examples.inputs.shape[1]:
                yield batch


@given(
    lengths=st.lists(st.integers(3, 14), min_size=1, max_size=700),
    size=st.integers(1, 3),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_an_epoch_has_the_batches_of_a_walk_through_it(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    source = bucketed(lengths, tokens=12)
    size = min(size, len(lengths))
    order = homology.epoch_order(seed, random_streams.TRAINING, epoch, len(lengths)).tolist()
    theirs = {tuple(b) for b in walk(source, order[: len(order) // size * size], size)}
    try:
        count = source._batches(size)
    except DataError:
        # At most what a bucket's last long ones share their batch with was taken for lost.
        assert len(theirs) <= -(-len(lengths) // (100 * size))
        return
    ours = [
        source.batch(seed, random_streams.TRAINING, epoch * count + n, size).targets[:, 0].tolist()
        for n in range(count)
    ]

    assert len({tuple(batch) for batch in ours}) == count
    assert {tuple(batch) for batch in ours} <= theirs
    assert len(theirs) - count <= -(-len(lengths) // (100 * size))


def test_padding_counts_up_to_the_longest_of_the_batch() -> None:
    source = bucketed([3, 4, 5, 6, 9, 10, 20, 30], tokens=12)
    for step in range(30):
        batch = source.batch(2, random_streams.TRAINING, step, 2)
        own = (batch.inputs > 0).sum(1)
        assert batch.lengths is not None
        assert batch.lengths.tolist() == [own.max()] * 2
        assert own.max() <= 10
        assert own.max() - own.min() <= 1


def test_evaluation_batches_are_four_times_as_large() -> None:
    source = bucketed([5] * 100, tokens=12)

    assert len(source.batch(0, random_streams.EVALUATION, 0, 8)) == 32
    assert len(source.batch(0, random_streams.EVALUATION, 0, 30)) == 100
    assert len(source.batch(0, random_streams.TRAINING, 0, 8)) == 8


def test_epochs_differ_and_late_steps_are_no_walk() -> None:
    source = bucketed(list(range(3, 13)) * 20, tokens=11)
    count = source._batches(4)
    first, second = (
        [
            source.batch(1, random_streams.TRAINING, epoch * count + n, 4).targets.tolist()
            for n in range(9)
        ]
        for epoch in range(2)
    )

    assert first != second
    assert len(source.batch(1, random_streams.TRAINING, 10**12, 4)) == 4


def test_batches_that_may_all_be_dropped_are_refused() -> None:
    source = bucketed([30, 5, 5, 5], tokens=12)

    assert source.batch(0, random_streams.TRAINING, 5, 2).lengths is not None
    with pytest.raises(DataError, match=r"1 of 4 sequences have more than 12 tokens.* batch of 4"):
        source.batch(0, random_streams.TRAINING, 0, 4)


@pytest.mark.parametrize("backbone", ["gpt2", "bert"])
def test_masking_behind_the_longest_is_a_shorter_tensor(
    backbone: str, write_proteins: Write, tmp_path: Path
) -> None:
    # What the paper's code computes, from tensors as long as their longest sequence.
    own = task(write_proteins(tmp_path))
    trial = TrialConfig(
        task=own,
        backbone={"name": backbone, "size": "tiny"},
        pretraining="random",
        protocol="paper",
        steps=1,
        seed=0,
    )
    model = build_model([trial]).eval()
    batch = own.splits("paper").train.batch(0, random_streams.TRAINING, 1, 3)
    assert batch.lengths is not None
    longest = int(batch.lengths[0])
    assert longest < own.tokens
    inputs = torch.from_numpy(batch.inputs)
    with torch.no_grad():
        masked = model(inputs, torch.from_numpy(batch.lengths))
        short = model(inputs[:, :longest])

    assert masked.shape == (3, 1, 1200)
    assert torch.allclose(masked, short, atol=1e-5)


# --- Folders and the Hub


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_says_the_same(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    (tmp_path / "reference").mkdir()
    write_csv(tmp_path / "reference")
    splits = task(tmp_path).splits("sound")

    assert splits.digest == task(tmp_path / "reference").splits("sound").digest
    for source, expected in zip(
        (splits.train, splits.validation, splits.test), SPLITS, strict=True
    ):
        examples = stored(source).examples
        assert as_text(examples) == [f"<cls>{sequence}<sep>" for sequence, _ in expected]
        assert examples.targets[:, 0].tolist() == [fold for _, fold in expected]


@pytest.mark.parametrize("kind", WRITERS)
def test_identity_is_the_content(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    before = task(tmp_path).identity()

    assert task(tmp_path, revision="other").identity() == before
    assert RemoteHomology(folder=tmp_path, tokens=24).identity() == before
    name = next(path for path in tmp_path.iterdir() if "valid" in path.name)
    other = next(path for path in tmp_path.iterdir() if "train" in path.name)
    name.rename(tmp_path / "aside")
    other.rename(name)
    (tmp_path / "aside").rename(other)
    assert task(tmp_path).identity() != before


def test_identity_tells_folder_from_hub(write_proteins: Write, tmp_path: Path) -> None:
    hub = RemoteHomology()

    assert hub.identity() != RemoteHomology(revision="other").identity()
    assert hub.identity() != RemoteHomology(repository="Hauser7733/TAPE_Remote_Homology").identity()
    assert task(write_proteins(tmp_path)).identity()["repository"] is None


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("missing", ["train", "valid", "test"])
def test_half_a_data_set(kind: str, missing: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    path = next(path for path in tmp_path.iterdir() if missing in path.name)
    path.rename(tmp_path / "elsewhere")
    # A test split may have one of two names.
    name = r"test_fold_holdout\.csv" if path.name == "test.csv" else path.name
    with pytest.raises(DataError, match=rf"{name} missing; a folder of remote-homology holds"):
        task(tmp_path).identity()


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: train\.csv and valid\.csv and .* missing"):
        task(tmp_path / "nowhere").splits("sound")


def test_fewer_sequences_are_taken_for_half_a_download(tmp_path: Path) -> None:
    write_csv(tmp_path)
    with pytest.raises(DataError, match=r"train\.csv: holds 3 sequences, TAPE's 12,312; .*subset"):
        RemoteHomology(folder=tmp_path).splits("sound")


def test_more_sequences_than_there_are(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "test.csv").write_text("\n".join(["seq,label", *["AC,3"] * 719]))
    with pytest.raises(DataError, match=r"test\.csv: holds 719 sequences, TAPE's 718"):
        task(tmp_path).splits("sound")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", r":1: its columns are none; there have to be primary and fold_label or seq and label"),
        ("sequence,label\nAC,3\n", r":1: its columns are sequence, label"),
        ("seq,label\n", r": holds no sequences"),
        ("seq,label\nAC,3\nAC", r":3: 1 fields, not 2; is it cut off\?"),
        ("seq,label\nAC,\n", r":2: the fold has to lie between 0 and 1,194, not ''"),
        ("seq,label\nAC,1195\n", r":2: the fold has to lie between 0 and 1,194, not 1195"),
        ("seq,label\nAC,-1\n", r":2: the fold has to lie .*, not '-1'"),
        ("seq,label\nAC,3\n\nAJ,3\n", r":3: 0 fields"),
        ("seq,label\nAJ,3\n", r":2: 'J' is no residue; these are ABC"),
        ("seq,label\nac,3\n", r":2: 'a' is no residue"),
        ("seq,label\nAé,3\n", r":2: 'é' is no residue"),
        ("seq,label\n,3\n", r":2: the sequence has to be letters, not ''"),
        (b"seq,label\n\xff\xfe,3\n", r": cannot be read .*fetch it again"),
    ],
)
def test_a_csv_that_is_wrong_is_named(content: str | bytes, problem: str, tmp_path: Path) -> None:
    write_csv(tmp_path)
    given_bytes = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "valid.csv").write_bytes(given_bytes)
    with pytest.raises(DataError, match=rf"valid\.csv{problem}"):
        task(tmp_path).splits("sound")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"primary": "AC", "fold_label": 3}', "cannot be read .*fetch it again"),
        (
            '{"primary": "AC", "fold_label": 3}',
            "not a file of TAPE: it has to be a list of objects",
        ),
        ('[{"primary": "AC"}]', "record 0: not an object with primary and fold_label"),
        ('[{"primary": "AC", "fold_label": true}]', "record 0: the fold has to lie"),
        ('[{"primary": 3, "fold_label": 3}]', "record 0: the sequence has to be letters"),
    ],
)
def test_a_json_that_is_wrong_is_named(content: str, problem: str, tmp_path: Path) -> None:
    write_json(tmp_path)
    (tmp_path / "remote_homology_valid.json").write_text(content)
    with pytest.raises(DataError, match=rf"remote_homology_valid\.json: {problem}"):
        task(tmp_path).splits("sound")


def change_lmdb(folder: Path, key: bytes, value: bytes | None) -> None:
    with (
        lmdb.open(str(folder / "remote_homology_valid.lmdb")) as environment,
        environment.begin(write=True) as transaction,
    ):
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        (b"0", None, "record 0 missing"),
        (b"num_examples", None, "record num_examples missing"),
        (b"num_examples", pickle.dumps("1"), "num_examples has to be a number, not '1'"),
        (b"0", pickle.dumps({"primary": "AC"}), "record 0: not an object with"),
        (b"0", pickle.dumps({"primary": "AC", "fold_label": 3})[:-9], "record 0: not a pickle"),
        (b"0", pickle.dumps(Path("x")), "record 0: not a pickle of plain values"),
    ],
)
def test_an_lmdb_that_is_wrong_is_named(
    key: bytes, value: bytes | None, problem: str, tmp_path: Path
) -> None:
    write_lmdb(tmp_path)
    change_lmdb(tmp_path, key, value)
    with pytest.raises(DataError, match=rf"remote_homology_valid\.lmdb: {problem}"):
        task(tmp_path).splits("sound")


@pytest.mark.parametrize("size", [0, 100, 4096, 8192, -4096, -1])
def test_half_an_lmdb(size: int, tmp_path: Path) -> None:
    # Pages that are mapped and not there would end the process.
    write_lmdb(tmp_path)
    file = tmp_path / "remote_homology_valid.lmdb" / "data.mdb"
    file.write_bytes(file.read_bytes()[: size if size >= 0 else file.stat().st_size + size])
    with pytest.raises(DataError, match=r"remote_homology_valid\.lmdb: .*fetch it again"):
        task(tmp_path).splits("sound")


def test_reading_an_lmdb_leaves_no_trace(tmp_path: Path) -> None:
    write_lmdb(tmp_path)
    for lock in tmp_path.glob("*/lock.mdb"):
        lock.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    task(tmp_path).splits("sound")

    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


def test_without_the_package_lmdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lmdb(tmp_path)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"takes the package lmdb, .*`pip install lmdb`, or give"):
        task(tmp_path).splits("sound")


def test_the_hub_offline_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"proteinea/remote_homology: not in the .* name a folder"):
        RemoteHomology().splits("sound")


def hub(names: tuple[str, ...], columns: tuple[str, str] = ("primary", "fold_label")) -> Any:
    import datasets

    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {
                    column: list(values)
                    for column, values in zip(columns, zip(*split, strict=True), strict=True)
                }
            )
            for name, split in zip(names, SPLITS, strict=True)
        }
    )


@pytest.mark.parametrize(
    ("repository", "names", "files"),
    [
        ("proteinea/remote_homology", ("train", "validation", "test"), "test_fold_holdout.csv"),
        ("Hauser7733/TAPE_Remote_Homology", ("train", "validation", "test_fold_holdout"), None),
        ("Hauser7733/TAPE_Remote_Homology", ("train", "valid", "fold"), None),
    ],
)
def test_what_the_hub_gives_is_what_a_folder_gives(
    repository: Any,
    names: tuple[str, ...],
    files: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def load(data: HubData, **arguments: Any) -> Any:
        asked.update(arguments, data=data)
        return hub(names)

    monkeypatch.setattr(HubData, "load", load)
    write_csv(tmp_path)
    remote = RemoteHomology(repository=repository, revision="r", subset=True, tokens=24)

    assert remote.splits("sound").digest == task(tmp_path).splits("sound").digest
    assert asked["data"] == remote.hub()
    assert (asked["data"].repository, asked["data"].revision) == (repository, "r")
    assert (asked["data_files"] or {}).get("test") == files


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (hub(("train", "validation", "family")), "has no split test_fold_holdout or .*, but train"),
        (
            hub(("train", "validation", "test"), ("seq", "fold_label")),
            "train has no column primary",
        ),
    ],
)
def test_a_hub_that_has_changed(found: Any, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubData, "load", lambda data, **arguments: found)
    with pytest.raises(DataError, match=f"proteinea/remote_homology: {problem}"):
        RemoteHomology(subset=True).splits("sound")


def test_the_real_proteins(data: Path) -> None:
    own = RemoteHomology(folder=data / "remote_homology")
    splits = own.splits("sound")
    sizes = [len(stored(s)) for s in (splits.train, splits.validation, splits.test)]
    train = stored(splits.train).examples

    assert sizes == [12_312, 736, 718]
    assert own.too_long() == {"train": 7, "validation": 2, "test": 0}
    assert len(np.unique(train.targets)) == FOLDS
    assert own.baseline("sound").accuracy == pytest.approx(20 / 718)
    assert own.baseline("paper").accuracy == pytest.approx(15 / 736)


def test_the_real_proteins_lose_hardly_a_batch(data: Path) -> None:
    paper = RemoteHomology(folder=data / "remote_homology").splits("paper")
    assert isinstance(paper.train, Bucketed)
    assert isinstance(paper.test, Bucketed)

    assert paper.train._batches(4) >= 12_312 // 4 - 7
    assert paper.test._batches(16) >= 736 // 16 - 2
